"""Many adapters on one base, answered in shared batches.

`engine` is the Python interface; `server` puts HTTP and a web page in front of it.
"""
