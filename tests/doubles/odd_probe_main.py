"""A probe with engines that misbehave: takes its order as the real one does."""

from doubles.odd_engines import MAKERS

from immich_ml_metal.qualification.child import main

if __name__ == "__main__":
    main(MAKERS)
