"""`python -m immich_ml_metal` is the command line."""

from immich_ml_metal.cli import main

if __name__ == "__main__":
    main()
