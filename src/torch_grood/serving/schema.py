"""What OpenAPI says of the routes, where their code does not say it itself."""

from __future__ import annotations

from typing import Any

__all__ = ["DRIFT", "INFO", "READY", "SCORE", "TRAINING"]


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | more


def _optional(kind: str, description: str = "") -> dict[str, Any]:
    return {"type": [kind, "null"], "description": description}


def _answer(description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {} if schema is None else {"content": {"application/json": {"schema": schema}}}
    return {"description": description} | content


_ERROR = _object({"error": {"type": "string", "description": "What is wrong, and what to do."}})
_IMAGE = {"type": "string", "format": "byte", "description": "An image file in base64."}
_NAMED = _object({"name": {"type": "string"}, "data": _IMAGE}, required=["data"])
_FILE = {"schema": {"type": "string", "format": "binary"}}
_NEIGHBOR = _object(
    {
        "sample": {"type": "integer", "description": "Position in the training set."},
        "name": _optional("string", "Class folder and file, where the service shows training images."),
        "image": _optional("string", "Path of its thumbnail, where the service shows training images."),
    }
)
_ROW = _object(
    {
        "name": _optional("string", "As it was sent."),
        "label": _optional("string", "The classifier's class."),
        "prototype_label": _optional("string", "Class of the nearest prototype."),
        "score": _optional("number", "Higher is more OOD."),
        "p_value": _optional("number", "Conformal: how usual the image is among known ones."),
        "is_ood": _optional("boolean", "The decision; null without a calibration."),
        "neighbors": {"type": ["array", "null"], "items": _NEIGHBOR},
        "error": _optional("string", "Why the image has no score."),
    }
)
_RESULTS = _object({"results": {"type": "array", "items": _ROW}})
_PROTECTED = {"401": _answer("The token is missing or wrong.", _ERROR)}

SCORE: dict[str, Any] = {
    "summary": "Decide about images",
    "tags": ["images"],
    "operationId": "score",
    "parameters": [
        {
            "name": "neighbors",
            "in": "query",
            "description": "Nearest training images of each image.",
            "schema": {"type": "integer", "minimum": 1, "maximum": 20, "default": 1},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "image/*": _FILE,
            "multipart/form-data": {
                "schema": _object({"images": {"type": "array", "items": {"type": "string", "format": "binary"}}})
            },
            "application/json": {
                "schema": {
                    "oneOf": [
                        _object({"image": _IMAGE}, required=["image"]),
                        _object({"images": {"type": "array", "items": _NAMED}}, required=["images"]),
                    ]
                }
            },
        },
    },
    "responses": {
        "200": _answer("At least one image has a score; the others say why not.", _RESULTS),
        "400": _answer("The body is not what its type says.", _ERROR),
        "408": _answer("The body did not arrive in time.", _ERROR),
        "413": _answer("Too many bytes or images.", _ERROR),
        "415": _answer("A body of another type.", _ERROR),
        "422": _answer("No image could be scored; `results` says why, or `error`.", _RESULTS),
        "503": _answer("Too much to do; try again after `Retry-After` seconds.", _ERROR),
    }
    | _PROTECTED,
}
INFO: dict[str, Any] = {
    "responses": {"200": _answer("Classes, preprocessing, promised rate, limits, and the fit.", _object({}))}
    | _PROTECTED
}
DRIFT: dict[str, Any] = {
    "responses": {
        "200": _answer(
            "The last window that was tested, and the one under way.",
            _object(
                {
                    "alarm": {"type": "boolean"},
                    "statement": {"type": "string", "description": "What an alarm means."},
                    "last": {"type": ["object", "null"]},
                }
            ),
        ),
        "404": _answer("The detector promises no rate.", _ERROR),
    }
    | _PROTECTED
}
TRAINING: dict[str, Any] = {
    "parameters": [
        {
            "name": "sample",
            "in": "path",
            "required": True,
            "description": "Position in the training set, as neighbors have it.",
            "schema": {"type": "integer", "minimum": 0},
        }
    ],
    "responses": {
        "200": {"description": "WebP, at most 160 pixels a side.", "content": {"image/webp": _FILE}},
        "404": _answer("Not shown, or not there.", _ERROR),
    }
    | _PROTECTED,
}
READY: dict[str, Any] = {"responses": {"200": _answer("It does."), "503": _answer("Not yet, or no more.", _ERROR)}}
