"""A PostgreSQL server for tests, from the distribution's binaries, on a port and in a folder of its own."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]


class Server:
    """`start` and `stop` keep the data; the folder must be one that the user postgres can reach."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"
        if os.getuid() == 0:
            shutil.chown(folder, "postgres")
        self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync", "-D", str(self.data))

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.data} -c fsync=off"
        self._run("pg_ctl", "start", "--wait", "-D", str(self.data), "-o", options, "-l", f"{self.data}/log")

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--mode=immediate", "-D", str(self.data))

    def _run(self, program: str, *arguments: str) -> None:
        who = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # PostgreSQL refuses to be root
        command = [*who, str(BINARIES[0] / program), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
