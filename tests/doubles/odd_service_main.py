"""The service on a Mac of `odd_engines`: `python odd_service_main.py ROLE [SOCKET]`.

ROLE is `gateway` (settings as the next argument), `worker` or `check`: each starts the next.
"""

import json
import os
import sys
from pathlib import Path

from doubles.odd_engines import command_of, note, odd_mac, read_scenario

from immich_ml_metal.gateway import serving
from immich_ml_metal.logs import configure_logging
from immich_ml_metal.qualification import background
from immich_ml_metal.qualification.checker import Tools, machine_memory
from immich_ml_metal.qualification.children import measure
from immich_ml_metal.qualification.order import Order
from immich_ml_metal.qualification.verdict import Verdict
from immich_ml_metal.settings import Settings
from immich_ml_metal.worker.compose import build_app
from immich_ml_metal.worker.process import read_settings, serve

PROBE = command_of("odd_probe_main")


def main(role: str, argument: str) -> None:
    me = command_of("odd_service_main")
    if role == "gateway":
        settings = Settings.model_validate_json(argument)
        configure_logging(settings, "gateway")
        serving.run(settings, command=(*me, "worker"), check_command=(*me, "check", argument))
    elif role == "worker":
        settings = Settings.model_validate_json(read_settings())
        configure_logging(settings, "worker")
        serve(
            build_app(settings, odd_mac(settings.models_dir), start=str(os.getppid())),
            Path(argument),
        )
    else:
        check(Settings.model_validate_json(argument))


def check(settings: Settings) -> None:
    models = settings.models_dir

    async def probe(order: Order) -> Verdict:
        note(models, f"probe {order.candidate} {order.key}")
        return await measure(order, PROBE)

    def memory() -> tuple[int, int]:
        short = read_scenario(models).get("memory")
        return (int(short), 8 * 2**30) if short is not None else machine_memory()

    limits_s: dict[str, float] = dict.fromkeys(("mlx", "coreml", "vision"), 10.0)
    background.main(Tools(probe, memory, limits_s), odd_mac(models))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else json.dumps({}))
