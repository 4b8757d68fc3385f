"""Checks that services share: a field the server does not know would be ignored, and the caller would never learn."""

from typing import Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from lorafold.errors import InvalidField


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """Raises InvalidField if `message`, or a message in it, has a field that this server's API does not have."""
    unknown = [field.field_number for field in cast(Any, UnknownFieldSet(message))]
    if unknown:
        raise InvalidField(
            path or type(message).__name__,
            f"has field number {unknown[0]}, which this server does not know: upgrade the server or leave it out",
        )
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        inner = f"{path}.{descriptor.name}" if path else descriptor.name
        for item in value if descriptor.is_repeated else [value]:
            refuse_unknown_fields(item, inner)


def required(message: Message, field: str) -> None:
    """Raises InvalidField if the message field `field` is not set."""
    if not message.HasField(field):
        raise InvalidField(field, "is missing: set it")
