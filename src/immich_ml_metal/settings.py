"""Every setting, once: its type, default, names and a line of help. Read by `settings_sources`."""

from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, SecretStr
from pydantic.fields import FieldInfo

from immich_ml_metal.setting_kinds import (
    Flag,
    LogLevel,
    Names,
    Place,
    Rewritings,
    Size,
    SizeOrZero,
    setting,
)
from immich_ml_metal.state import default_folder
from immich_ml_metal.threads import core_count
from immich_ml_metal.types import FACE_MIN_SCORE

MIB = 2**20
SECRET = frozenset({"immich_api_key"})  # settings whose value is never shown

# Where each group of settings begins, in the order of the class.
GROUPS = MappingProxyType(
    {
        "host": "Service",
        "profile": "Answers",
        "clip_engine": "Engines",
        "offline": "Downloads",
        "model_ttl_s": "Memory",
        "max_concurrent_requests": "Limits",
        "log_format": "Log",
        "immich_url": "Immich",
    }
)


class Settings(BaseModel):
    """Every knob. Units are in the names; each is documented by `immich-ml-metal config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    host: str = setting(
        "0.0.0.0", "ML_HOST", "IMMICH_HOST", "MACHINE_LEARNING_HOST", help="Address to listen on."
    )
    port: int = setting(
        3003,
        "ML_PORT",
        "IMMICH_PORT",
        "MACHINE_LEARNING_PORT",
        ge=0,
        le=65535,
        help="TCP port to listen on; 0 picks one.",
    )
    log_level: LogLevel = setting(
        "info", "ML_LOG_LEVEL", "IMMICH_LOG_LEVEL", help="error, warning, info or debug."
    )
    models_dir: Place = setting(
        Path("~/.cache/immich_ml"),
        "ML_MODELS_DIR",
        "MACHINE_LEARNING_CACHE_FOLDER",
        help="Model folder, in the layout of Immich's own cache.",
    )
    state_dir: Place | None = setting(
        None,
        "ML_STATE_DIR",
        help="Folder for what the service remembers between starts; unset is the platform's own.",
    )

    profile: Literal["balanced", "native", "exact"] = setting(
        "balanced",
        "ML_PROFILE",
        help="balanced: Apple reads text, Immich's models do the rest; native: Apple finds faces "
        "too; exact: Immich's models for everything.",
    )
    clip_model: str = setting(
        "ViT-B-32__openai", "ML_CLIP_MODEL", help="CLIP model that demo, bench and pull use."
    )
    face_model: str = setting(
        "buffalo_l", "ML_FACE_MODEL", help="Face model that demo, bench and pull use."
    )
    ocr_model: str = setting(
        "PP-OCRv6_small", "ML_OCR_MODEL", help="Text model that demo, bench and pull use."
    )
    model_revision: str = setting(
        "main",
        "ML_MODEL_REVISION",
        "MACHINE_LEARNING_MODEL_REVISION",
        pattern=r"^[\w.-]+$",
        help="Revision of Immich's model repositories: main, or v2 for the optimised exports.",
    )
    index_guard: Literal["hold", "warn", "off"] = setting(
        "hold",
        "ML_INDEX_GUARD",
        help="When vectors would be made otherwise than the index's: hold serves the former ones "
        "until `models accept`; warn only says so; off does neither.",
    )
    immich_compat: Literal["3.3", "3.2"] = setting(
        "3.3",
        "ML_IMMICH_COMPAT",
        help="Resize rule of the server that built the index; 3.2 crops where 3.3 squashes.",
    )
    face_min_score: float = setting(
        FACE_MIN_SCORE,
        "ML_FACE_MIN_SCORE",
        ge=0,
        le=1,
        help="Lowest face score when a request names none (0..1).",
    )

    clip_engine: Literal["auto", "mlx", "coreml", "cpu", "open_clip"] = setting(
        "auto", "ML_CLIP_ENGINE", help="Engine for search: auto, mlx, coreml, cpu or open_clip."
    )
    face_detection_engine: Literal["auto", "vision", "mlx", "coreml", "cpu"] = setting(
        "auto",
        "ML_FACE_DETECTION_ENGINE",
        help="Engine that finds faces: auto, vision, mlx, coreml or cpu.",
    )
    face_recognition_engine: Literal["auto", "coreml", "mlx", "cpu"] = setting(
        "auto",
        "ML_FACE_RECOGNITION_ENGINE",
        help="Engine that tells faces apart: auto, coreml, mlx or cpu.",
    )
    ocr_engine: Literal["auto", "vision", "mlx", "coreml", "cpu"] = setting(
        "auto", "ML_OCR_ENGINE", help="Engine for text: auto, vision, mlx, coreml or cpu."
    )
    use_coreml: bool = setting(
        True, "ML_USE_COREML", help="Let auto choose Core ML where this Mac runs it correctly."
    )
    use_ane: bool = setting(
        True, "ML_USE_ANE", help="Let Core ML use the Neural Engine; off means GPU and CPU only."
    )
    ocr_language_correction: bool = setting(
        True,
        "ML_OCR_LANGUAGE_CORRECTION",
        help="Let Apple Vision correct text by its dictionaries; off suits codes and numbers.",
    )
    mlx_dtype: Literal["auto", "float16", "mixed", "bfloat16", "float32"] = setting(
        "auto",
        "ML_MLX_DTYPE",
        help="Number format of the mlx engine; auto is float16 on a GPU, float32 on a CPU.",
    )
    graph_rewriting: Rewritings = setting(
        ("all",),
        "ML_GRAPH_REWRITING",
        help="Which rewritings shorten the models' graphs: all, off, or some of rows, length, "
        "gelu and upscaling, to compare.",
    )

    offline: bool = setting(
        False, "ML_OFFLINE", "HF_HUB_OFFLINE", help="Never download; serve what is on disk."
    )
    model_organization: str = setting(
        "immich-app",
        "ML_MODEL_ORGANIZATION",
        "MACHINE_LEARNING_MODEL_ORGANIZATION",
        pattern=r"^[\w.-]+$",
        help="Hugging Face organisation that holds Immich's models.",
    )
    hub_endpoint: str | None = setting(
        None,
        "ML_HUB_ENDPOINT",
        "HF_ENDPOINT",
        pattern=r"^https?://",
        help="Address of the model hub or a mirror of it; the Hugging Face hub by default.",
    )
    modelscope_endpoint: str = setting(
        "https://www.modelscope.cn",
        "ML_MODELSCOPE_ENDPOINT",
        pattern=r"^https?://",
        help="Address of ModelScope or a mirror of it, for the text models.",
    )
    download_timeout_s: float = setting(
        30.0,
        "ML_DOWNLOAD_TIMEOUT",
        "HF_HUB_DOWNLOAD_TIMEOUT",
        gt=0,
        help="Seconds without a byte after which a download is tried again.",
    )

    model_ttl_s: float = setting(
        300.0,
        "ML_MODEL_TTL",
        "MACHINE_LEARNING_MODEL_TTL",
        ge=0,
        help="Seconds after which an unused model is unloaded; 0 keeps models.",
    )
    memory_limit_bytes: SizeOrZero = setting(
        0,
        "ML_MEMORY_LIMIT",
        ge=0,
        help="Worker memory above which it is restarted between requests; 0 is no limit.",
    )
    preload_clip_textual: Names = setting(
        (),
        "ML_PRELOAD_CLIP_TEXTUAL",
        "MACHINE_LEARNING_PRELOAD__CLIP__TEXTUAL",
        "MACHINE_LEARNING_PRELOAD__CLIP",  # until v3.0: both halves
        help="CLIP models whose text half is loaded at start.",
    )
    preload_clip_visual: Names = setting(
        (),
        "ML_PRELOAD_CLIP_VISUAL",
        "MACHINE_LEARNING_PRELOAD__CLIP__VISUAL",
        "MACHINE_LEARNING_PRELOAD__CLIP",
        help="CLIP models whose image half is loaded at start.",
    )
    preload_face_detection: Names = setting(
        (),
        "ML_PRELOAD_FACE_DETECTION",
        "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION__DETECTION",
        "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION",
        help="Face models whose detector is loaded at start.",
    )
    preload_face_recognition: Names = setting(
        (),
        "ML_PRELOAD_FACE_RECOGNITION",
        "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION__RECOGNITION",
        "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION",
        help="Face models whose recogniser is loaded at start.",
    )
    preload_ocr_detection: Names = setting(
        (),
        "ML_PRELOAD_OCR_DETECTION",
        "MACHINE_LEARNING_PRELOAD__OCR__DETECTION",
        help="Text models whose detector is loaded at start.",
    )
    preload_ocr_recognition: Names = setting(
        (),
        "ML_PRELOAD_OCR_RECOGNITION",
        "MACHINE_LEARNING_PRELOAD__OCR__RECOGNITION",
        help="Text models whose reader is loaded at start.",
    )

    max_concurrent_requests: int = setting(
        0,
        "ML_MAX_CONCURRENT_REQUESTS",
        ge=0,
        help="Requests worked on at once; more wait their turn. 0 is two per core, at least 4.",
    )
    request_threads: int = setting(
        0,
        "ML_REQUEST_THREADS",
        "MACHINE_LEARNING_REQUEST_THREADS",
        ge=0,
        help="Threads that decode and prepare pictures; 0 is one per core.",
    )
    intra_op_threads: int = setting(
        0,
        "ML_INTRA_OP_THREADS",
        "MACHINE_LEARNING_MODEL_INTRA_OP_THREADS",
        ge=0,
        help="Threads of one ONNX Runtime inference; 0 is one per core.",
    )
    max_image_size_bytes: Size = setting(
        100 * MIB, "ML_MAX_IMAGE_SIZE", help="Largest upload, in bytes or as 64MB."
    )
    decode_other_formats: bool = setting(
        False,
        "ML_DECODE_OTHER_FORMATS",
        help="Also decode TIFF, HEIF, AVIF, BMP and others; Immich sends JPEG or WebP.",
    )
    request_timeout_s: float = setting(
        120.0,
        "ML_REQUEST_TIMEOUT",
        "MACHINE_LEARNING_WORKER_TIMEOUT",
        gt=0,
        help="Seconds a request may take once its models are loaded.",
    )
    hold_limit_s: float = setting(
        280.0,
        "ML_HOLD_LIMIT",
        gt=0,
        help="Seconds a request is held before it is refused; under the 300 s of Node's fetch.",
    )
    drain_limit_s: float = setting(
        30.0, "ML_DRAIN_LIMIT", gt=0, help="Seconds to answer what was accepted before a stop."
    )

    log_format: Literal["text", "json"] = setting(
        "text", "ML_LOG_FORMAT", help="text for people, json for log collectors."
    )
    no_color: Flag = setting(
        False, "ML_NO_COLOR", "NO_COLOR", help="Plain text on a terminal as well."
    )
    log_file: Place | None = setting(
        None, "ML_LOG_FILE", help="Write the log to this file; the worker's goes beside it."
    )

    immich_url: str | None = setting(
        None,
        "ML_IMMICH_URL",
        pattern=r"^https?://",
        help="Address of the Immich server, to look after its queues (http://nas:2283).",
    )
    immich_api_key: SecretStr | None = setting(
        None,
        "ML_IMMICH_API_KEY",
        help="API key of an Immich admin, to look after its queues; never logged.",
    )
    immich_guard: bool = setting(
        True,
        "ML_IMMICH_GUARD",
        help="Pause Immich's queues while we cannot serve; ask for lost jobs. Needs url and key.",
    )

    @property
    def state_folder(self) -> Path:
        """Where documents of the service's memory lie."""
        return self.state_dir.expanduser() if self.state_dir else default_folder()

    @property
    def concurrency(self) -> int:
        """Requests worked on at once: enough to keep every core and batch busy, and no more.

        Each one holds a decoded picture, some twenty megabytes for a preview.
        """
        return self.max_concurrent_requests or max(4, 2 * core_count())


def env_names(field: FieldInfo) -> list[str]:
    """The environment names of a setting, the project's own first."""
    extra = field.json_schema_extra
    return [str(name) for name in extra["env"]] if isinstance(extra, dict) else []  # type: ignore[union-attr]


def grouped() -> dict[str, list[str]]:
    """The names of all settings, by their group."""
    groups: dict[str, list[str]] = {}
    title = ""
    for name in Settings.model_fields:
        title = GROUPS.get(name, title)
        groups.setdefault(title, []).append(name)
    return groups
