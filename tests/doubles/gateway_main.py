"""A gateway process with the fake worker behind it: `python gateway_main.py FOLDER SETTINGS`."""

import sys
from pathlib import Path

from immich_ml_metal.gateway import serving
from immich_ml_metal.settings import Settings

if __name__ == "__main__":
    fake = [sys.executable, str(Path(__file__).with_name("worker.py")), sys.argv[1]]
    serving.run(Settings.model_validate_json(sys.argv[2]), command=fake)
