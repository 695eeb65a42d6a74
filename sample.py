"""Make pictures: python sample.py checkpoint=RUN_OR_FOLDER prompt="..." out=DIR; see docs/sample.md."""

from ldm.commands.sample import main

if __name__ == "__main__":
    main()
