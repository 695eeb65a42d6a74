"""`python -m ldm.data.cache`, see ldm/commands/cache_latents.py."""

import sys

from ldm.commands.cache_latents import main

if __name__ == "__main__":
    sys.exit(main())
