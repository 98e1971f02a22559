"""`cache-logits`: runs a job on the requested engine. Every engine builds shards with `Worker`, so all give the same
cache.

local   this process (`this_machine`); with several workers, a process for each (`local_processes`)
ray     an actor for each device of a cluster (`ray`; extra `ray`)
slurm   a task of a job array for each worker (`slurm`; extra `slurm`)

Any scheduler that starts processes and gives each its rank works, too (`worker_index`): worker i of n builds the shards
with number % n = i, and then helps with those that others have not started, where the store supports leases.
The receipts in the cache are the only state, so a job may resume with any other engine and number of workers.
"""

from __future__ import annotations

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import OpenJob, check_stream
from logit_cache.caching.survey import survey
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import Outcome
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.this_machine import run_job_here, run_pool, run_to_end
from storage.errors import InputError


def run_job(job: CacheJob, options: EngineOptions, log: JobLog, opened: OpenJob | None = None) -> Outcome:
    """Build the missing shards of a job on the requested engine, then the index and report of a complete entry.

    opened: the job, where this process has checked and opened it already. Raises the errors of `storage.errors`, and
    NotDone where shards failed permanently, workers were lost, or the job was stopped.
    """
    if options.engine == "local":
        return run_job_here(job, options, log, opened)
    run = _run_slurm if options.engine == "slurm" else _run_ray
    return run_to_end(job, options, log, lambda stopping: run(job, options, log, stopping))


def _run_slurm(job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping) -> Outcome:
    from logit_cache.engines.slurm.array import run_array

    return run_array(job, options, log, stopping)


def _run_ray(job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping) -> Outcome:
    from logit_cache.engines.ray.actors import RayPool
    from logit_cache.engines.ray.cluster import connect

    if job.device_map is not None:
        raise InputError(
            "--device-map spreads a teacher over the devices of a machine, and a worker of Ray has one: leave "
            "it out, or start cache-logits on each machine with --worker i/n"
        )
    check_stream(job)
    found = survey(job)
    with connect(options.ray_address) as alone, RayPool(job, options, log, found, alone) as pool:
        return run_pool(pool, job, options, log, stopping, found)
