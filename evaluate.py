"""Measures a model: python evaluate.py checkpoint=RUN_OR_FOLDER out=DIR; see docs/sample.md and docs/evaluate.md."""

from ldm.commands.evaluate import main

if __name__ == "__main__":
    main()
