"""Composed configurations: checked against the constructors, built into objects, run as commands.

The only room that knows Hydra and OmegaConf. One YAML key is one constructor argument, `_target_` picks the
class, and a name that does not exist is an error that offers the nearest ones.
"""
