"""The pause injector under the name the experiments use; the same as ``python -m pause_lightning inject``."""

import sys

from pause_lightning.errors import UserError
from pause_lightning.inject import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"gsm8k_pause_injector: {error}", file=sys.stderr)
        sys.exit(2)
