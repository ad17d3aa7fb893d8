"""`python ARGS` as a fork of the server at $CION_NB_FORKS; this small process stands for it until it ends: for those
who start a Python by its name (job scripts, Jupyter, a launcher). A true Python where a fork would be another thing.
"""
import os
import signal
import sys

import forked

server, env = forked.server(), dict(os.environ)
if not server.can_be(env): os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
link = forked.ask(server.door, (0, 1, 2), args=sys.argv[1:], env=env, cwd=os.getcwd(), start_new_session=True,
                  leaves_with_asker=True)
told = link.makefile()
pid = int(told.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: os.kill(pid, number))
sys.exit(int(told.readline() or 1) & 0xff)
