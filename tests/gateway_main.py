"""A gateway process with the fake engine behind it: `python gateway_main.py FOLDER SETTINGS_JSON`."""

import sys
from pathlib import Path

from gateway_harness import fake_engine
from immich_ml_metal import serving
from immich_ml_metal.config import Settings

if __name__ == "__main__":
    serving.run(Settings.model_validate_json(sys.argv[2]), command=fake_engine(Path(sys.argv[1])))
