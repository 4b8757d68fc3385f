"""Structured logs on stderr; stdout is for people. Called once, by the command line."""

import logging
import sys
from typing import TextIO

import structlog

from lorafold.config import LogConfig


def set_up_logging(config: LogConfig, stream: TextIO = sys.stderr) -> None:
    """Sends this process's log lines to `stream` as text or as one JSON object a line."""
    last: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if config.format == "json"
        else structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)
    )
    before = [structlog.processors.format_exc_info] if config.format == "json" else []
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *before,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.level.upper())),
        logger_factory=structlog.WriteLoggerFactory(stream),
    )
