"""What several commands take."""

from typing import Annotated

import typer

# Texts and not paths: pathlib would make s3:/ of s3://. What reads a store parses them, by
# `moescope.tracer.object_path.store_path`.
STORE_HELP = "The trace store: a folder, s3://BUCKET/PATH or gs://BUCKET/PATH."

Store = Annotated[str, typer.Argument(metavar="STORE", help=STORE_HELP)]
