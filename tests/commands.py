"""Commands through typer, in this process."""

from typer.testing import CliRunner


def invoke(app, *arguments):
    """Standard output of a command of `app`; its errors are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
