import gc
import threading
import time
import weakref

import pytest

from modeldiff._progress import watcher
from modeldiff.errors import Cancelled
from modeldiff_widgets import JobRunner
from modeldiff_widgets._job_bar import JobBar


@pytest.fixture
def runner():
    with_one = JobRunner()
    yield with_one
    with_one.close()


def slow(job, n=2000, pause=0.005):
    for i in range(n):
        time.sleep(pause)
        job.report(i / n, f"step {i}")
    return "finished"


def started(job, seconds=5.0):
    end = time.monotonic() + seconds
    while job.status == "queued" and time.monotonic() < end:
        time.sleep(0.002)
    return job


def test_a_job_runs_in_the_one_worker_and_hands_its_result_on(runner):
    seen = []
    job = runner.submit(
        lambda job: threading.current_thread().name,
        key="a",
        on_done=lambda j: seen.append(j.result),
    )
    assert runner.wait(5)
    assert job.status == "done"
    assert job.fraction == 1.0
    assert seen == ["modeldiff-jobs"]
    runner.submit(lambda job: threading.get_ident(), key="b")
    assert runner.wait(5)
    assert [t.name for t in threading.enumerate()].count("modeldiff-jobs") == 1


def test_the_latest_job_of_a_key_wins(runner):
    done = []
    first = runner.submit(slow, key="slide", on_done=lambda j: done.append("first"))
    started(first)
    later = [
        runner.submit(lambda job, i=i: i, key="slide", on_done=lambda j: done.append(j.result))
        for i in range(50)
    ]
    assert runner.wait(5)
    assert first.status == "cancelled"
    assert done == [49]
    assert {job.status for job in later[:-1]} == {"cancelled"}
    assert runner.n_waiting == 0


def test_jobs_of_other_keys_are_left_alone(runner):
    one = started(runner.submit(lambda job: slow(job, 20), key="one"))
    two = runner.submit(lambda job: "two", key="two")
    three = runner.submit(lambda job: "three", key="three")
    assert runner.wait(5)
    assert [one.status, two.status, three.status] == ["done"] * 3


def test_without_preempt_the_running_one_finishes(runner):
    one = started(runner.submit(lambda job: slow(job, 20), key="k"))
    two = runner.submit(lambda job: "two", key="k", preempt=False)
    assert runner.wait(5)
    assert (one.status, two.status) == ("done", "done")


def test_a_result_that_is_out_of_date_is_not_shown(runner):
    shown, gate = [], threading.Event()
    one = runner.submit(lambda job: gate.wait(5), key="k", on_done=lambda j: shown.append("old"))
    started(one)
    runner.submit(lambda job: None, key="k", preempt=False, on_done=lambda j: shown.append("new"))
    gate.set()
    assert runner.wait(5)
    assert shown == ["new"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_the_worker_survives_any_error_and_says_what_it_was(runner, error):
    def broken(job):
        raise error

    job = runner.submit(broken, key="broken")
    assert runner.wait(5)
    assert job.status == "failed"
    assert job.error[0].startswith(type(error).__name__)
    assert "in broken" in job.error[1]
    after = runner.submit(lambda job: "alive", key="after")
    assert runner.wait(5)
    assert after.result == "alive"


def test_an_error_while_showing_is_an_error_of_the_job(runner):
    job = runner.submit(lambda job: 1, key="k", on_done=lambda j: 1 / 0)
    assert runner.wait(5)
    assert job.status == "failed"
    assert job.error[0] == "ZeroDivisionError: division by zero"


def test_cancelling_is_quick_and_is_no_error(runner):
    seconds = []
    for _ in range(5):
        job = started(runner.submit(slow, key="k"))
        start = time.monotonic()
        runner.cancel()
        assert runner.wait(5)
        seconds.append(time.monotonic() - start)
        assert (job.status, job.error) == ("cancelled", None)
    assert sorted(seconds)[2] <= 0.3


def test_cancel_by_key_leaves_others_waiting(runner):
    one = started(runner.submit(slow, key="one"))
    two = runner.submit(lambda job: 2, key="two")
    three = runner.submit(lambda job: 3, key="three")
    runner.cancel("two")
    runner.cancel("one")
    assert runner.wait(5)
    assert [one.status, two.status, three.status] == ["cancelled", "cancelled", "done"]


def test_reports_are_shown_at_most_twenty_times_a_second(runner):
    told = []
    runner.on_change(lambda job: told.append(job.status))

    def eager(job):
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            job.report(0.5, "x")

    runner.submit(eager, key="k")
    assert runner.wait(5)
    assert 5 <= told.count("running") <= 14
    assert told[-1] == "done"


def test_report_raises_once_the_job_is_cancelled(runner):
    caught = []

    def work(job):
        job.cancel.set()
        try:
            job.progress(1, 2, "half")
        except Cancelled as error:
            caught.append(error)
            raise

    job = runner.submit(work, key="k")
    assert runner.wait(5)
    assert caught
    assert job.status == "cancelled"


def test_a_view_that_breaks_does_not_end_the_worker(runner):
    runner.on_change(lambda job: 1 / 0)
    job = runner.submit(lambda job: "fine", key="k")
    assert runner.wait(5)
    assert job.status == "done"


def test_waiting_has_an_end_and_a_job_cannot_wait_for_itself(runner):
    started(runner.submit(slow, key="k"))
    assert not runner.wait(0.05)
    runner.cancel()
    job = runner.submit(lambda job: runner.wait(1), key="self")
    assert runner.wait(5)
    assert job.error[0].startswith("RuntimeError: a job cannot wait")


def test_submitting_from_many_threads_loses_nothing(runner):
    jobs, lock = [], threading.Lock()

    def many(name):
        for i in range(50):
            job = runner.submit(lambda job: None, key=f"{name}{i}")
            with lock:
                jobs.append(job)

    threads = [threading.Thread(target=many, args=(n,)) for n in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runner.wait(10)
    assert len(jobs) == 200
    assert {job.status for job in jobs} == {"done"}


def test_close_ends_the_thread_and_refuses_more():
    runner = JobRunner()
    job = started(runner.submit(slow, key="k"))
    runner.close()
    runner.close()
    assert job.status == "cancelled"
    assert "modeldiff-jobs" not in [t.name for t in threading.enumerate()]
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(slow, key="k")


def test_a_finished_job_is_not_kept_alive(runner):
    class Big:
        pass

    job = runner.submit(lambda job: Big(), key="k")
    assert runner.wait(5)
    gone = weakref.ref(job.result)
    del job
    runner.submit(lambda job: None, key="other")
    assert runner.wait(5)
    gc.collect()
    assert gone() is None


def test_jobs_on_a_server_are_told_of_whatever_call_makes_them(runner):
    """The library tells whoever watches; a panel's call need not pass anything on."""
    bar, said, gate = JobBar(runner), [], threading.Event()
    runner.on_change(lambda job: said.append((job.remote, bar.message)))

    def work(job):
        watching = watcher()
        assert watching is not None
        tell, cancel = watching.tell, watching.cancel
        assert cancel is job.cancel
        for state in ("sending", "queued", "running"):
            tell(state)
        for done in (1, 2):
            job.progress(done, 3, f"{done} of 3 batches")
            for state in ("kept",) if done == 1 else ("sending", "queued"):
                tell(state)
        tell("sending")
        gate.wait(5)
        assert job.cancel.is_set()
        tell("left")
        raise Cancelled("stopped waiting")

    job = started(runner.submit(work, key="remote"))
    while "step 3 of 3, job 4: sending" not in job.remote and not job.finished:
        time.sleep(0.002)
    runner.cancel()
    gate.set()
    assert runner.wait(5)
    told = [remote for remote, _ in said]
    seen = [each for each in dict.fromkeys(told) if each]
    assert seen[:3] == ["job 1: sending", "job 1: queued", "job 1: running"]
    assert seen[3:6] == ["job 3 of 3: sending", "job 3 of 3: queued", "step 3 of 3, job 4: sending"]
    assert "the server goes on with it" in bar.message
    assert watcher() is None, "in this thread nobody watches"
    later = runner.submit(lambda job: None, key="other")
    assert runner.wait(5)
    assert later.remote == ""
    bar.close()
