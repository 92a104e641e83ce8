"""Tensor operations of the adapted projection; nothing here knows a module."""
