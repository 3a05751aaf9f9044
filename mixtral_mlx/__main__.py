"""`python -m mixtral_mlx`: the same as the command `mixtral-mlx`."""

import sys

try:
    from .cli import main

    sys.exit(main())
except KeyboardInterrupt:  # in the tenth of a second before `main` takes care of it
    sys.exit(130)
