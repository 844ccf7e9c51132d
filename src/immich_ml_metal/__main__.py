"""The command line: `immich-ml-metal`, and `python -m immich_ml_metal`."""

import sys

INTERRUPTED = 130  # as `cli.output` documents it


def main() -> None:
    """Run the command line; Ctrl-C ends it in silence, while it is still being loaded as well."""
    try:
        from immich_ml_metal.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
