"""The demo set: a small base model that copies a string, and adapters that each do one checkable thing to it."""
