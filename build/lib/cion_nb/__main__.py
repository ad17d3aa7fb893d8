"`python -m cion_nb COMMAND`: the one command (companion/commands)."
import sys

from cion_nb.companion.commands import main

if __name__ == "__main__": sys.exit(main())
