import sys

from pipeline.cli import main


def run() -> None:
    """The program, as the console script calls it."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
