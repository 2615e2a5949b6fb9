"""How distance is felt (`--pos`). One file per scheme; see plugins.py for how a file becomes a flag."""
