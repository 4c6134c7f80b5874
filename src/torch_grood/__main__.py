"""``python -m torch_grood``: the `grood` command, for launchers that start modules (``accelerate launch -m``)."""

from torch_grood.cli import main

if __name__ == "__main__":
    main()
