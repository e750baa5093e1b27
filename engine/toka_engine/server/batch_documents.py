"""The OpenAPI descriptions of files and batches."""

from __future__ import annotations

from typing import Any

import msgspec

from toka_engine.server.batches import records
from toka_engine.server.endpoints.batches import BatchRequest
from toka_engine.server.endpoints.synchronous import SynchronousBatchRequest
from toka_engine.server.errors import ErrorAnswer

BODIES: tuple[type[msgspec.Struct], ...] = (
    BatchRequest,
    SynchronousBatchRequest,
    records.FileObject,
    records.FileList,
    records.DeletedFile,
    records.Batch,
    records.BatchList,
)
_ERRORS = {
    "400": "A field or parameter is wrong: `param` names it.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such object, or it is another key's.",
    "408": "The request did not arrive in time.",
    "409": "The object's state does not allow this.",
    "413": "The body is too large.",
    "415": "The body is of another type.",
    "500": "The request failed in the engine.",
    "501": "The server keeps no files: `data_dir` is not set.",
    "503": "The files are not open yet, or the engine is ending: `retry-after` says when to come again.",
    "507": "The disk, or the key's share of it, is full.",
}
_PARAMETERS = {
    "after": ({"type": "string"}, "the id behind which the page begins"),
    "limit": ({"type": "integer", "minimum": 1}, "the length of the page"),
    "order": ({"type": "string", "enum": ["asc", "desc"]}, "by age"),
    "purpose": ({"type": "string"}, "only files of this purpose"),
}
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch", "user_data"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}


def _content(body: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}


def _operation(name: str, answer: type[msgspec.Struct], summary: str, *errors: str) -> dict[str, Any]:
    statuses = sorted({*errors, "401", "500", "501", "503"})
    failures = {status: {"description": _ERRORS[status], "content": _content(ErrorAnswer)} for status in statuses}
    return {
        "operationId": name,
        "summary": summary,
        "security": [{"key": []}],
        "responses": {"200": {"description": summary, "content": _content(answer)}, **failures},
    }


def query_parameters(*names: str) -> dict[str, Any]:
    """Return the part of an operation that describes a list's query parameters."""
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": _PARAMETERS[name][0], "description": _PARAMETERS[name][1]}
            for name in names
        ]
    }


UPLOAD_FILE = {
    **_operation("uploadFile", records.FileObject, "Store a file", "400", "408", "413", "415", "507"),
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}},
}
LIST_FILES = {
    **_operation("listFiles", records.FileList, "A page of the stored files", "400", "404"),
    **query_parameters("after", "limit", "order", "purpose"),
}
FIND_FILE = _operation("retrieveFile", records.FileObject, "One file", "404")
DELETE_FILE = _operation("deleteFile", records.DeletedFile, "Delete a file", "404", "409", "507")
READ_FILE = _operation("downloadFile", records.FileObject, "The bytes of a file", "404")
READ_FILE["responses"]["200"]["content"] = {"application/octet-stream": {"schema": {"type": "string"}}}
CREATE_BATCH = {
    **_operation("createBatch", records.Batch, "Run the requests of a file", "400", "404", "408", "413", "415", "507"),
    "requestBody": {"required": True, "content": _content(BatchRequest)},
}
LIST_BATCHES = {
    **_operation("listBatches", records.BatchList, "A page of the batches", "400", "404"),
    **query_parameters("after", "limit"),
}
FIND_BATCH = _operation("retrieveBatch", records.Batch, "One batch", "404")
CANCEL_BATCH = _operation("cancelBatch", records.Batch, "End a batch", "404", "409", "507")
_ANSWERS = {"schema": {"type": "array", "items": {"type": "object"}}}
SYNCHRONOUS_BATCH = {
    "operationId": "createSynchronousBatch",
    "summary": "Answer many completion requests at once, as the original does",
    "security": [{"key": []}],
    "requestBody": {"required": True, "content": _content(SynchronousBatchRequest)},
    "responses": {
        "200": {"description": "The answers, in the order of the requests", "content": {"application/json": _ANSWERS}},
        **{
            status: {"description": _ERRORS[status], "content": _content(ErrorAnswer)}
            for status in ("400", "401", "408", "413", "415", "500", "503")
        },
    },
}
