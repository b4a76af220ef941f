"""The command `moescope`: puts the sub-commands together and prints errors.

Each `cli_*.py` beside this file is a thin layer over functions that Python callers use too.
"""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from moescope.clients.cli_analysis import register_analysis, store_app
from moescope.clients.cli_data import data_app, specimen_app
from moescope.clients.cli_doctor import register_doctor
from moescope.clients.cli_eval import eval_app
from moescope.clients.cli_import import export_app, import_app
from moescope.clients.cli_items import register_items
from moescope.clients.cli_mask import mask_app
from moescope.clients.cli_questions import register_questions
from moescope.clients.cli_report import register_report
from moescope.clients.cli_serve import register_serve
from moescope.clients.cli_tokens import experts_app, request
from moescope.clients.cli_trace import register_trace
from moescope.tracer.errors import MoescopeError

app = typer.Typer(
    name="moescope",
    help="Trace the expert routing of mixture-of-experts models in vLLM, and rank the experts "
    "whose use differs between two conditions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
register_serve(app)
register_trace(app)
register_analysis(app)
register_questions(app)
app.command("request")(request)
register_report(app)
app.add_typer(experts_app, name="experts")
app.add_typer(store_app, name="store")
app.add_typer(mask_app, name="mask")
app.add_typer(eval_app, name="eval")
register_items(data_app)
app.add_typer(data_app, name="data")
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")
app.add_typer(specimen_app, name="specimen")
register_doctor(app)


def main() -> None:
    """Run the command line; a failure that we can explain is one message and exit code 2."""
    try:
        app()
    except MoescopeError as error:
        console = Console(stderr=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
