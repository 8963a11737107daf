"""Run `generate` for each of some command lines, in the same processes: it is their start that takes long."""

import json
import sys

from pikv_cli import app


def main():
    for words in json.loads(sys.argv[1]):
        sys.argv = ["pikv", "generate", *words]
        try:
            app.main()
        except SystemExit as stop:
            if stop.code:
                raise


if __name__ == "__main__":
    main()
