"""An adapter on disk and on the hub: saving, strict loading, merging, combining, converting and pushing."""
