"""The embedded world: small bases and data made by rule, for a machine without the hub."""
