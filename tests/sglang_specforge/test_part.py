"""A server's part in an A/B that another process leads, and several such parts as one comparison."""

import asyncio
import threading

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from typer.testing import CliRunner

from sglang_specforge.ab import part as parts
from sglang_specforge.ab.cli import app
from sglang_specforge.ab.experiment import Experiments
from sglang_specforge.ab.part import NoPart, Part
from sglang_specforge.ab.report import Report
from sglang_specforge.ab.servers import Servers, compare_servers
from sglang_specforge.ab.windows import Windows
from sglang_specforge.client import Unanswered
from sglang_specforge.control import ControlService
from sglang_specforge.new_draft import init_draft
from sglang_specforge.routes import make_router
from sglang_specforge.swaps import DraftHeld, SwapRefused, Swaps
from tests.sglang_specforge.test_experiment import Serving
from tests.sglang_specforge.test_export import wait_for
from tests.tiny import make_run, make_target

LEADER, OTHER = "0123456789abcdef", "fedcba9876543210"
FAST = {"window_s": 0.1, "seed": 1}


@pytest.fixture
def service(tmp_path):
    """Of one server whose schedulers only count, with version 1 beside 0."""
    return make_service(tmp_path)


class Service:
    """What the routes ask of ``ControlService``, without its sockets."""

    versions = ControlService.versions

    def __init__(self, run):
        self.run, self.swaps, self._verdicts = run, Swaps(run, Serving(replicas=1)), {}
        windows = Windows(self.swaps)
        self.experiments, self.part = Experiments(self.swaps, windows, run.run_dir / "ab"), Part(self.swaps, windows)


def make_service(folder):
    service = Service(make_run(folder, make_target(folder / "target")))
    asyncio.run(service.swaps.add(folder / "draft", "me"))
    return service


def shown(service):
    return service.swaps._engine.banks[0]["active_version"]


def events(service):
    return [event["event"] for event in service.swaps.audit.last(100)]


def test_the_leader_alone_decides_what_is_shown_until_it_ends_that(service):
    async def body():
        await service.part.join(LEADER, [0, 1], "me")
        await service.part.show(LEADER, 1)
        assert shown(service) == 1
        turn = await service.part.look(LEADER)
        assert sum(turn.counted) >= 50
        for wrong in (service.part.show(OTHER, 0), service.part.look(OTHER), service.part.end(OTHER, "you")):
            with pytest.raises(NoPart):
                await wrong
        for refused in (service.part.join(OTHER, [0], "you"), service.swaps.activate(0, "you")):
            with pytest.raises(DraftHeld):
                await refused
        assert shown(service) == 1
        await service.part.end(LEADER, "me")
        assert (shown(service), service.swaps.active, service.swaps.holder) == (0, 0, None)
        with pytest.raises(NoPart):
            await service.part.show(LEADER, 1)

    asyncio.run(body())
    assert events(service)[-2:] == ["ab_joined", "ab_left"]


def test_a_leader_that_is_silent_for_too_long_has_left(service, monkeypatch):
    async def body():
        await service.part.join(LEADER, [0, 1], "me")
        await service.part.show(LEADER, 1)
        await service.part.end_if_left()
        assert shown(service) == 1
        monkeypatch.setattr(parts, "LEASE_S", 0.0)
        await service.part.end_if_left()
        assert (shown(service), service.swaps.holder) == (0, None)

    asyncio.run(body())
    assert "was not heard of" in service.swaps.audit.last(1)[0]["why"]


def test_what_is_promoted_is_active_and_what_cannot_be_leaves_the_draft_free(service):
    async def body():
        await service.part.join(LEADER, [0, 1], "me")
        await service.part.end(LEADER, "me", "better", promote=1)
        assert (shown(service), service.swaps.active) == (1, 1)
        await service.part.join(LEADER, [0, 1], "me")
        with pytest.raises(LookupError, match="no draft version 7"):
            await service.part.end(LEADER, "me", promote=7)
        assert (shown(service), service.swaps.holder) == (1, None)

    asyncio.run(body())


def test_an_arm_that_cannot_be_loaded_is_refused_and_nobody_holds_the_draft(service):
    service.swaps._engine.refusing = {0: 1}

    async def body():
        with pytest.raises(SwapRefused, match="no memory"):
            await service.part.join(LEADER, [0, 1], "me")
        assert service.swaps.holder is None
        service.swaps._engine.refusing = {}
        await service.part.join(OTHER, [0, 1], "me")

    asyncio.run(body())


class Listening:
    """A server's routes, on a port of this machine; errors are worded as SGLang's app words them."""

    def __init__(self, service):
        app = FastAPI()
        app.include_router(make_router(service, service.run))

        @app.exception_handler(HTTPException)
        async def refuse(request, error):
            return JSONResponse({"message": error.detail}, error.status_code)

        self.service = service
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self):
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def fleet(tmp_path):
    """Two servers, of which the second one has more traffic."""
    listening = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        listening.append(Listening(make_service(tmp_path / name)))
    yield listening
    for one in listening:
        one.close()


def lead(fleet, arms, **settings):
    reports = []
    servers = Servers([one.url for one in fleet], None)
    report = asyncio.run(compare_servers(servers, arms, {**FAST, **settings}, reports.append))
    return report, reports


def test_servers_show_different_arms_at_a_time_and_all_promote_the_winner(fleet, tmp_path):
    report, _ = lead(fleet, ["active", str(tmp_path / "a" / "draft")], promote=True)
    assert (report.state, report.outcome, report.winner, report.promoted) == ("ended", "better", 1, True), report.why
    a, b = ([version for (version,) in one.service.swaps._engine.shown] for one in fleet)
    assert all({one, other} == {0, 1} for one, other in zip(a, b, strict=True))
    assert all(set(a[i : i + 2]) == {0, 1} for i in range(0, len(a), 2))
    assert report.arms[0].passes == report.arms[1].passes
    assert [shown(one.service) for one in fleet] == [1, 1]
    assert all(one.service.swaps.holder is None for one in fleet)


def test_the_command_leads_shows_and_records_what_comes_out_of_it(fleet, tmp_path):
    urls = [part for one in fleet for part in ("--url", one.url)]
    settings = ["--window-s", "0.1", "--json", str(tmp_path / "ab.json"), "--html", str(tmp_path / "ab.html")]
    ran = CliRunner().invoke(app, ["start", *urls, "--b", str(tmp_path / "a" / "draft"), *settings])
    assert ran.exit_code == 0, ran.output
    report = Report.model_validate_json((tmp_path / "ab.json").read_bytes())
    assert (report.outcome, report.servers) == ("better", [one.url for one in fleet])
    assert "of 2 servers: ended" in ran.output
    assert "commits most tokens" in (tmp_path / "ab.html").read_text()


def test_the_command_says_which_server_cannot_be_asked(fleet):
    nobody = "http://127.0.0.1:9"
    ran = CliRunner().invoke(app, ["start", "--url", fleet[0].url, "--url", nobody, "--b", "1"])
    assert (ran.exit_code, fleet[0].service.swaps.holder) == (2, None)


def test_a_report_that_could_not_be_written_is_refused_before_anything_is_compared(fleet, tmp_path):
    asked = ["start", "--url", fleet[0].url, "--b", "1", "--json", str(tmp_path / "nowhere" / "ab.json")]
    ran = CliRunner().invoke(app, asked)
    assert (ran.exit_code, fleet[0].service.experiments.all()) == (2, [])


def test_without_promotion_each_server_is_left_as_it_was(fleet):
    report, _ = lead(fleet, ["active", "1"])
    assert (report.state, report.winner, report.promoted) == ("ended", 1, False)
    assert [shown(one.service) for one in fleet] == [0, 0]


def test_one_that_is_stopped_leaves_each_server_as_it_was(fleet):
    async def body():
        servers = Servers([one.url for one in fleet], None)
        settings = FAST | {"min_passes": 1000}  # never sees so many
        leading = asyncio.create_task(compare_servers(servers, ["active", "1"], settings, print))
        while not all(one.service.swaps._engine.shown for one in fleet):
            await asyncio.sleep(0.01)
        leading.cancel()
        return await leading

    report = asyncio.run(body())
    assert (report.state, report.blocks) == ("stopped", [])
    assert [shown(one.service) for one in fleet] == [0, 0]
    assert all(one.service.swaps.holder is None for one in fleet)


def test_leases_are_renewed_while_the_others_are_still_loading(fleet, monkeypatch):
    monkeypatch.setattr(parts, "LEASE_S", 1.0)
    slow, load = fleet[1].service.swaps, fleet[1].service.swaps._load

    async def load_slowly(version):
        await asyncio.sleep(1.5)
        await fleet[0].service.part.end_if_left()
        await load(version)

    monkeypatch.setattr(slow, "_load", load_slowly)
    report, _ = lead(fleet, ["active", "1"])
    assert report.state == "ended", report.why


def test_a_server_that_cannot_take_part_ends_it_for_all(fleet):
    async def hold():
        await fleet[1].service.swaps.hold("somebody", [0])

    asyncio.run(hold())
    report, reports = lead(fleet, ["active", "1"])
    assert (report.state, reports) == ("failed", [])
    assert "somebody decides which draft is active" in report.why
    assert fleet[1].url in report.why
    assert fleet[0].service.swaps.holder is None


def test_a_server_that_breaks_down_ends_it_and_the_others_are_let_go(fleet):
    fleet[1].service.swaps._engine.breaks = True
    report, _ = lead(fleet, ["active", "1"])
    assert report.state == "failed"
    assert fleet[1].url in report.why
    assert (shown(fleet[0].service), fleet[0].service.swaps.holder) == (0, None)


def test_drafts_that_are_not_known_to_be_the_same_are_no_arm(fleet, tmp_path):
    other = init_draft(str(tmp_path / "b" / "target"), tmp_path / "other", draft_vocab_size=32, seed=9)
    asyncio.run(fleet[1].service.swaps.add(other, "me"))
    with pytest.raises(Unanswered, match="no such version as 2"):
        lead(fleet, ["active", "2"])
    asyncio.run(fleet[1].service.swaps.activate(2, "me"))
    with pytest.raises(Unanswered, match="not known to be the same draft"):
        lead(fleet, ["active", "1"])
    with pytest.raises(Unanswered, match="named twice"):
        lead([fleet[0], fleet[0]], ["active", "1"])
