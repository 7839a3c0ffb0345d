"""What a request says of draft training: in its body's ``custom_params``, or in HTTP headers, which become such.

A request of a LoRA adapter that is not labelled is labelled with it.
"""

from typing import Any

OPT_KEY, SLICE_KEY = "draft_training", "draft_slice"
OPT_HEADER, SLICE_HEADER = "x-draft-training", "x-draft-slice"
_ANSWERS = {"true": True, "false": False}


def take_headers(manager: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``TokenizerManager.generate_request(obj, request)``, which all HTTP routes come to.

    Raises:
        ValueError: a header or the body says neither true nor false, or a label that is no text; SGLang answers 400.
    """
    said = _said(request.headers) if request is not None else {}
    adapter, sampling = getattr(obj, "lora_path", None), getattr(obj, "sampling_params", None) or {}
    for one in sampling if isinstance(sampling, list) else [sampling]:
        if isinstance(one, dict):
            _check(_own(one.get("custom_params")))
    if not said and not adapter:
        return
    if isinstance(adapter, list) and isinstance(sampling, dict):
        sampling = [sampling] * len(adapter)
    if isinstance(sampling, list):
        adapters = adapter if isinstance(adapter, list) else [adapter] * len(sampling)
        obj.sampling_params = [_with(one, said, name) for one, name in zip(sampling, adapters, strict=False)]
    elif isinstance(sampling, dict):
        obj.sampling_params = _with(sampling, said, adapter)


def asked(req: Any) -> dict[str, Any]:
    """Of a scheduler's ``Req``."""
    return _own(req.sampling_params.custom_params)


def _said(headers: Any) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if (answer := headers.get(OPT_HEADER)) is not None:
        if answer.strip().lower() not in _ANSWERS:
            raise ValueError(f"header {OPT_HEADER}: {answer!r} is not accepted; give true or false")
        said[OPT_KEY] = _ANSWERS[answer.strip().lower()]
    if (label := headers.get(SLICE_HEADER)) is not None:
        said[SLICE_KEY] = _decoded(label)
    return said


def _decoded(value: str) -> str:
    """Starlette takes every header for Latin-1; so a label in UTF-8 would be another one than in a body."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _own(custom_params: Any) -> dict[str, Any]:
    """What the body says; nothing where it is not of a kind that says anything."""
    return custom_params if isinstance(custom_params, dict) else {}


def _check(own: dict[str, Any]) -> None:
    """Whoever wrote ``"false"`` did not mean to be captured."""
    for key, kind, accepted in ((OPT_KEY, bool, "true or false"), (SLICE_KEY, str, "text")):
        if not isinstance(value := own.get(key), kind | None):
            raise ValueError(f"custom_params {key}: {value!r} is not accepted; give {accepted}")


def _with(sampling: dict[str, Any], said: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    """A no in the body stands, whatever the header says."""
    own = _own(sampling.get("custom_params"))
    refused = {OPT_KEY: False} if own.get(OPT_KEY) is False else {}
    label = {SLICE_KEY: f"adapter:{adapter}"} if adapter else {}
    return {**sampling, "custom_params": {**label, **own, **said, **refused}}
