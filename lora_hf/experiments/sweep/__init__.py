"""A sweep trains one config many times with values that Optuna chooses, and finds those with the best score.

Several processes can share the trials of one study in a database.
"""
