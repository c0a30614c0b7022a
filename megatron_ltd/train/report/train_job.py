"""Progress of a run for Kubeflow Trainer, which shows it in the status of the TrainJob."""

import json
import ssl
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib import request

from megatron_ltd.log import Console
from megatron_ltd.train.process.environment import StatusServer

SHOWN = {"lm_loss": "loss", "learning_rate": "learning_rate", "kept_length": "kept_length",
         "cumulative_saving": "flops_saved"}
INTERVAL_SECONDS = 15.0
TIMEOUT_SECONDS = 5.0


class TrainJobStatus:
    """Sends the newest progress now and then, from a thread: a server that is away holds up nothing."""

    def __init__(self, server: StatusServer, console: Console, interval_seconds: float = INTERVAL_SECONDS):
        self._server, self._console, self._interval = server, console, interval_seconds
        self._began: tuple[int, float] | None = None
        self._newest: dict[str, Any] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_until_closed, daemon=True)
        self._thread.start()

    def tell(self, step: int, total_steps: int, fields: Mapping[str, Any]) -> None:
        """The progress from now on.

        Args:
            fields: of the metrics file.
        """
        now = time.monotonic()
        began_step, began = self._began = self._began or (step, now)
        status = {"progressPercentage": 100 * step // total_steps,
                  "metrics": [{"name": "step", "value": str(step)},
                              *({"name": name, "value": str(fields[field])} for field, name in SHOWN.items()
                                if field in fields)],
                  "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds")}
        if step > began_step:
            status["estimatedRemainingSeconds"] = round((total_steps - step) * (now - began) / (step - began_step))
        self._newest = {"trainerStatus": status}

    def close(self) -> None:
        """Send the last progress, and end."""
        self._closing.set()
        self._thread.join(2 * TIMEOUT_SECONDS)

    def _send_until_closed(self) -> None:
        sent, is_last = None, False
        while not is_last:
            is_last = self._closing.wait(self._interval)
            newest = self._newest
            if newest is not None and newest is not sent:
                try:
                    self._send(newest)
                except (OSError, ValueError) as error:  # URLError and HTTPError are of the first kind
                    self._console.warn_once("the TrainJob's status server does not take the progress of the run, "
                                            f"which goes on: {error}")
                sent = newest

    def _send(self, body: dict[str, Any]) -> None:
        server = self._server
        authority = ssl.create_default_context(cafile=server.authority) if server.authority else None
        headers = {"Content-Type": "application/json"}
        if server.token:
            headers["Authorization"] = f"Bearer {Path(server.token).read_text().strip()}"
        message = request.Request(server.url, json.dumps(body).encode(), headers, method="POST")
        with request.urlopen(message, timeout=TIMEOUT_SECONDS, context=authority):
            pass
