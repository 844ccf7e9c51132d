"""A gateway process with the fake worker behind it: `gateway_main.py FOLDER SETTINGS [TIMES]`.

TIMES is JSON and replaces the times of the guard of Immich's queues.
"""

import json
import sys
from pathlib import Path

from immich_ml_metal.gateway import serving
from immich_ml_metal.logs import configure_logging
from immich_ml_metal.settings import Settings

if __name__ == "__main__":
    fake = [sys.executable, str(Path(__file__).with_name("worker.py")), sys.argv[1]]
    settings = Settings.model_validate_json(sys.argv[2])
    configure_logging(settings, "gateway")
    if len(sys.argv) > 3:
        from immich_ml_metal.immich import own

        own.TIMES = own.Times(**json.loads(sys.argv[3]))
    serving.run(settings, command=fake)
