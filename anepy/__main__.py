"""Run the command line: `anepy`, and `python -m anepy`."""

from .system import beginning

beginning.hold()

from .cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
