"""Keep the leases of the jobs that this process runs in a database that several machines share.

A lease is the time, on the clock of the database, until which a process owns its jobs. This process renews all its
leases every few seconds. It relies on them for a shorter time, on its own monotonic clock. A process whose leases have
expired has died, or cannot reach the database. Other processes then take its jobs over.
"""

import asyncio
import logging
import math
import time

from sqlalchemy import update

from app.exceptions import Unavailable
from app.jobs.backends import WRITES
from app.jobs.database import Database
from app.jobs.rows import JobRow
from app.tasks import cancel_and_wait
from app.threads import Threads

log = logging.getLogger(__name__)

_RENEWALS = 6  # per lease; the last one of them is left to end a job's process


class LeaseKeeper:
    """The leases of this process. Without a shared database, nothing is renewed and nothing expires.

    Args:
        database: The job database.
    """

    def __init__(self, database: Database):
        self._database = database
        self._interval_s = database.lease_s / _RENEWALS
        self._threads = Threads("the leases of jobs", 1)
        self._task: asyncio.Task[None] | None = None
        self._since: float | None = None  # monotonic time since which every renewal has succeeded
        self.deadline = -math.inf if database.shared else math.inf
        """Monotonic time until which this process relies on its leases."""

    def start(self) -> None:
        """Start to renew the leases."""
        if self._database.shared:
            self._task = asyncio.create_task(self._renew_periodically())

    async def stop(self) -> None:
        """Stop renewing."""
        await cancel_and_wait(self._task)
        self._threads.close()

    @property
    def valid(self) -> bool:
        """True while this process owns its jobs, and may begin others."""
        return time.monotonic() < self.deadline

    @property
    def may_take_over(self) -> bool:
        """True if expired leases show that other processes have died.

        After the database itself was unavailable, the others need one lease to renew theirs.
        """
        if not self._database.shared:
            return True
        return self._since is not None and time.monotonic() - self._since > self._database.lease_s

    async def _renew_periodically(self) -> None:
        while True:
            begun = time.monotonic()
            try:
                await self._threads.read(self._renew)
                self._since = self._since or begun
                self.deadline = begun + self._database.lease_s - self._interval_s
            except Unavailable as error:
                if self._since:
                    log.warning("the leases of jobs cannot be renewed: %s", error)
                self._since = None
            await asyncio.sleep(self._interval_s)

    def _renew(self) -> None:
        own = update(JobRow).where(JobRow.runner == self._database.owner, JobRow.lease.is_not(None))
        with self._database.transaction(WRITES) as session:
            session.execute(own.values(lease=self._database.new_lease(session)))
