"""Drafts in production on the real server: activated, rolled back and compared under load, without a change to what
clients get."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import hypothesis
import psutil
import pytest
import schemathesis
import torch
from safetensors.torch import save_file
from schemathesis.core.control import SkipTest
from schemathesis.generation import GenerationMode

from sglang_specforge.checkpoint import content_of, load_config, read_tensors
from sglang_specforge.traffic import stream_prompts
from tests.e2e.conftest import TARGET, TRAINING, customize_servers, prompts, wait_for
from tests.e2e.test_attach import AttachedTrainer
from tests.e2e.test_far import far_trainer

CLI = [sys.executable, "-m", "sglang_specforge"]
LEARNING = {
    **TRAINING, "publish-every-s": 3, "keep-versions": 500, "epochs-per-token": 16, "holdout-every": 4, "gate": "auto",
}  # fmt: skip
LEARNT = 1.5  # acceptance length
NOTHING = {"trainer": "none", "draft-vocab-size": 768, "gate": "off"}


def command(client, *arguments, code=0):
    given = [*CLI, *map(str, arguments), "--url", client.server.url]
    ran = subprocess.run(given, capture_output=True, text=True, timeout=300)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@contextmanager
def load(client, expected):
    """Requests keep flowing while the body runs; every answer has to be what the target alone says."""
    wrong, done, ended, asked = [], [], threading.Event(), prompts(50)

    def keep_asking(first):
        place = first
        while not ended.is_set():
            answer = client.generate(asked[place % 50])
            wrong.extend([place] if answer["output_ids"] != expected[place % 50] else [])
            done.append(place)
            place += 4

    threads = [threading.Thread(target=keep_asking, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert done


def active(client):
    return client.status()["draft"]["active_version"]


def events(client, kind):
    return [event for event in client.get("/draft/events?last=1000").json() if event["event"] == kind]


def committed(client, version):
    seen = client.status()["acceptance_by_version"].get(str(version)) or {"passes": 0, "tokens": 0}
    return seen["passes"], seen["tokens"]


def live_length(client, version):
    """Acceptance length of 24 requests from here on."""
    passes, tokens = committed(client, version)
    client.generate_all(prompts(24))
    now_passes, now_tokens = wait_for("counts", lambda: (c := committed(client, version))[0] > passes and c)
    return (now_tokens - tokens) / (now_passes - passes)


@pytest.fixture(scope="module")
def learning(start, reference):
    """A server whose draft has learnt, version by version, each let live by the gate."""
    reference()
    client = start("--dtype", "float32", training=LEARNING)

    def enough():
        client.generate_all(prompts(24, seed=1), tokens=64)
        found = client.status()["acceptance_by_version"].get(str(active(client)))
        return found and found["passes"] > 20 and found["length"] > LEARNT

    wait_for(f"an acceptance length of {LEARNT}", enough, 400)
    return client


@pytest.fixture(scope="module")
def drafts(learning, tmp_path_factory):
    """Checkpoints of one draft: hardly trained, and trained."""
    trained, folder = active(learning), tmp_path_factory.mktemp("drafts")
    for name, version in (("half", max(1, trained // 4)), ("trained", trained)):
        shutil.copytree(learning.run_dir / "versions" / f"{version:06d}", folder / name)
    return folder / "half", folder / "trained"


def test_the_gate_lets_better_drafts_live_and_holds_the_others_back(learning, drafts):
    live = [event for event in events(learning, "activated") if event["who"] == "trainer"]
    held_back = events(learning, "held_back")
    assert live
    assert all("tokens a verification, at least +" in event["why"] for event in live)
    # Asked for last: the trainer goes on publishing.
    verdicts = {one["version"]: one["verdict"] for one in learning.get("/draft/versions").json()}
    assert all(verdicts[event["version"]]["passed"] for event in live)
    assert all(not verdicts[event["version"]]["passed"] for event in held_back)


def test_the_guard_takes_back_a_worse_draft_that_was_forced_past_the_gate(learning, drafts, reference):
    assert learning.post("/draft/gate", json={"mode": "propose"}).json() == {"mode": "propose"}
    newest = learning.get("/draft/versions").json()[-1]["version"]
    with load(learning, reference()):
        wait_for("the guard knows it", lambda: learning.status()["draft"]["guard"]["looks"] > 8)
        trained = active(learning)  # a version that was on its way when the gate changed is there by now
        learning.post("/draft/activate", json={"version": 0, "why": "a mistake"})
        wait_for("the guard's doing", lambda: active(learning) == trained, 60)
    (rolled_back,) = events(learning, "rolled_back")
    assert (rolled_back["who"], rolled_back["before"], rolled_back["version"]) == ("guard", 0, trained)
    assert "less)" in rolled_back["why"]
    # What the trainer published meanwhile waits for a person.
    proposed = wait_for("a proposal", lambda: events(learning, "proposed"))
    assert proposed[-1]["version"] > newest
    assert active(learning) == trained
    assert learning.post("/draft/activate", json={"version": proposed[-1]["version"]}).json()["changed"]


@pytest.fixture(
    params=[
        "its own trainer",
        pytest.param("attached trainer", marks=pytest.mark.slow),
        pytest.param("trainer elsewhere", marks=pytest.mark.slow),
    ]
)
def not_learning(start, request, tmp_path):
    """A server whose trainer's draft stays what it is."""
    settings, rate = {**LEARNING, "learning-rate": 1e-9}, ("--learning-rate", 1e-9)
    trainer = None
    if request.param == "its own trainer":
        client = start("--dtype", "float32", training=settings)
    else:
        name = ("--served-model-name", request.param)  # no server is that of another test
        client = start("--dtype", "float32", *name, training={**settings, "trainer": "none"})
        if request.param == "attached trainer":
            trainer = AttachedTrainer([client], tmp_path / "run", ("-m", "trainer"), rate)
        else:
            trainer = far_trainer(client, tmp_path, *rate)
    yield client
    if trainer is not None:
        trainer.end()


def test_training_goes_on_from_a_better_draft_that_was_swapped_in(not_learning, drafts, reference):
    client = not_learning
    with load(client, reference()):
        command(client, "swap", drafts[1])
        swapped_in = active(client)
        wait_for("it is taken up", lambda: client.status()["trainer"]["taken_up"] == 1, 120)
        assert active(client) == swapped_in
        published = client.status()["trainer"]["version"]
        newest = wait_for("a version of it", lambda: (t := client.status()["trainer"])["version"] > published and t)
        assert newest["held_out_acceptance_length"] > 1.2  # by itself, it had learnt nothing
    gains = [one["verdict"]["gain"] for one in client.get("/draft/versions").json() if one["verdict"]]
    assert sum(gain is not None and gain < -0.2 for gain in gains) >= 3


@pytest.fixture
def client(start, drafts):
    return start("--dtype", "float32", "--enable-metrics", training=NOTHING)


def add(client, checkpoint):
    answer = client.post("/draft/versions", json={"path": str(checkpoint), "activate": False})
    assert answer.status_code == 200, answer.text
    return answer.json()["version"]


def test_a_live_comparison_finds_the_better_draft_and_promotes_it(client, drafts, reference, tmp_path):
    half, trained = (add(client, draft) for draft in drafts)
    assert add(client, drafts[1]) == trained  # what is a version already keeps its number
    command(client, "activate", half)
    page = tmp_path / "page.html"
    with load(client, reference()):
        said = command(
            client, "ab", "start", "--a", "active", "--b", drafts[1], "--window-s", 1, "--min-passes", 60,
            "--seed", 3, "--promote", "--wait", "--html", page,
        )  # fmt: skip
    assert f"version {trained} commits most tokens a verification (better)" in " ".join(said.split())
    assert active(client) == trained
    report = client.get("/draft/ab").json()[-1]
    assert (report["state"], report["outcome"], report["winner"], report["promoted"]) == (
        "ended", "better", trained, True
    )  # fmt: skip
    found = report["judgement"]["pairs"][0]["acceptance_length"]
    assert 0 < found["low"] < found["high"]
    assert report["arms"][0]["acceptance_length"] < report["arms"][1]["acceptance_length"]
    assert "<svg" not in page.read_text()  # it is carried in an address
    assert "data:image/svg+xml" in page.read_text()
    (promoted,) = [event for event in events(client, "activated") if event["version"] == trained]
    assert promoted["who"] == f"ab/{report['id']}"
    assert promoted["step"] > 0


def test_a_comparison_holds_the_draft_until_it_is_stopped(client, drafts):
    half, trained = (add(client, draft) for draft in drafts)
    before = active(client)
    plan = {"arms": [half, trained], "window_s": 0.2, "max_blocks": 1000}  # there is no load: it waits
    id = client.post("/draft/ab", json=plan).json()["id"]
    for path, body in (
        ("/draft/ab", plan), ("/draft/activate", {"version": half}), ("/draft/rollback", {}),
        ("/draft/versions", {"path": str(drafts[0])}),
    ):  # fmt: skip
        answer = client.post(path, json=body)
        assert answer.status_code == 409
        assert f"DELETE /draft/ab/{id}" in answer.json()["message"]
    command(client, "ab", "stop", id)
    assert client.get(f"/draft/ab/{id}").json()["state"] == "stopped"
    assert active(client) == before
    assert client.status()["draft"]["held_by"] is None
    assert client.get("/draft/ab/99").status_code == 404


def swap_200_times(client, versions):
    for i in range(200):
        answer = client.post("/draft/activate", json={"version": versions[i % 2]})
        assert answer.status_code == 200, answer.text


def test_output_is_the_target_s_through_200_swaps_and_a_rollback(client, drafts, reference):
    versions = [add(client, draft) for draft in drafts]
    client.post("/draft/activate", json={"version": versions[1]})
    swaps = client.status()["draft"]["swaps"]
    with load(client, reference()) as done:
        long = threading.Thread(target=lambda: answers.append(client.generate(prompts(1)[0], 400, ignore_eos=True)))
        answers = []
        long.start()
        swap_200_times(client, versions)
        long.join()
        assert command(client, "rollback", "--why", "to see").startswith(f"version {versions[0]} is active")
        answered = len(done)
        wait_for("requests after the rollback", lambda: len(done) > answered + 8)
    status = client.status()["draft"]
    assert status["swaps"] == swaps + 201
    assert status["active_version"] == versions[0]
    assert events(client, "rolled_back")[-1]["why"] == "to see"
    served_by = answers[0]["meta_info"]["draft_versions"]  # each swap is another turn
    assert len(served_by) > 5
    assert served_by[:4] in (versions[::-1] * 2, versions * 2)
    assert client.generate(prompts(1)[0])["meta_info"]["draft_versions"] == [versions[0]]
    assert client.generate(prompts(1)[0], 1)["meta_info"]["draft_versions"] == []
    for path, asked in (("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
                        ("completions", {"prompt": "hi"})):  # fmt: skip
        answer = client.post(f"/v1/{path}", json={"model": "default", "max_tokens": 24, "n": 2, **asked}).json()
        assert answer["metadata"]["draft_versions"] == [versions[0]]


def test_another_trainers_draft_is_swapped_into_a_running_server(client, drafts, tmp_path):
    """As SpecForge saves it: its own embedding, no ``t2d``, and no word about the target."""
    given, tensors = tmp_path / "given", read_tensors(drafts[1])
    given.mkdir()
    V, H = tensors.pop("t2d").numel(), tensors["norm.weight"].numel()
    save_file(tensors | {"embed_tokens.weight": torch.zeros(V, H)}, given / "model.safetensors", {"format": "pt"})
    config = {key: value for key, value in load_config(drafts[1]).items() if not key.startswith("specforge")}
    (given / "config.json").write_text(json.dumps(config))
    command(client, "swap", given)
    taken = active(client)
    assert content_of(client.run_dir / "versions" / f"{taken:06d}") == content_of(drafts[1])
    assert live_length(client, taken) > LEARNT - 0.2
    command(client, "swap", given, "--upload")
    assert active(client) == taken
    assert "architecture 'LlamaForCausalLM'" in command(client, "swap", TARGET, code=1)
    assert active(client) == taken


def test_a_restarted_server_serves_what_was_rolled_back_to(client, drafts):
    half, trained = (add(client, draft) for draft in drafts)
    for version in (trained, half):
        client.post("/draft/activate", json={"version": version})
    assert client.post("/draft/rollback", json={}).json()["version"] == trained
    client.server.restart()
    status = client.status()["draft"]
    assert status["active_version"] == trained
    assert status["gate"] == "propose"
    client.post("/draft/gate", json={"mode": "off"})
    command(client, "activate", half, "--why", "again")
    shown = command(client, "versions").splitlines()
    assert [str(half) in line for line in shown if "active" in line] == [True]
    assert events(client, "activated")[-1]["why"] == "again"

    numbered = events(client, "added")[-1]
    assert (numbered["who"], numbered["path"].rsplit("/", 1)[1]) == ("server", "initial")
    command(client, "rollback", "--to", numbered["version"])
    client.generate_all(prompts(8))
    assert client.status()["acceptance_by_version"][str(numbered["version"])]["length"] < 1.2  # as of a random draft


def test_prometheus_has_series_by_version(client, drafts):
    version = add(client, drafts[0])
    client.post("/draft/activate", json={"version": version})
    client.generate_all(prompts(8))

    def series():
        lines = (line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[:1] != "#")
        return {name: float(value) for name, value in lines if name.startswith("sglang_specforge:")}

    wait_for("its verifications", lambda: series().get(f'sglang_specforge:verifications_total{{version="{version}"}}'))
    found = series()
    assert found["sglang_specforge:active_version"] == version
    assert found["sglang_specforge:acceptance_length"] >= 1
    assert found["sglang_specforge:swaps_total"] >= 1
    assert "sglang:num_running_reqs" in client.get("/metrics").text


def test_a_fall_of_acceptance_with_the_draft_unchanged_is_drift_of_the_slice_that_fell(client, drafts):
    version, answers = add(client, drafts[1]), []
    client.post("/draft/activate", json={"version": version})
    turned, ended = threading.Event(), threading.Event()
    learnt = prompts(24, seed=1)  # what the draft has learnt from
    familiar = [itertools.cycle(learnt[i:] + learnt[:i]) for i in range(0, 24, 6)]

    def keep_asking(name, asked, until):
        body = {"sampling_params": {"max_new_tokens": 48, "temperature": 0, "ignore_eos": True,
                                    "custom_params": {"draft_slice": name}}}  # fmt: skip
        for prompt in itertools.takewhile(lambda _: not until.is_set(), asked):
            answers.append(client.post("/generate", json={"text": prompt, **body}))

    def drift():
        return client.status()["draft"]["drift"]

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking, "steady", asked, ended) for asked in familiar[:2]]
        asking += [pool.submit(keep_asking, "turning", asked, turned) for asked in familiar[2:]]
        try:
            usual = wait_for("what is usual", lambda: drift()["levels"].get("turning", {}).get("usual"))
            assert "turning" not in drift()["moved"]
            turned.set()
            others = [stream_prompts(seed, family="numbers") for seed in range(2)]
            asking += [pool.submit(keep_asking, "turning", asked, ended) for asked in others]
            wait_for("drift", lambda: "turning" in drift()["moved"])
        finally:
            turned.set()
            ended.set()
    assert not any(asked.exception() for asked in asking)
    assert {answer.status_code for answer in answers} == {200}
    assert "steady" not in (moved := drift()["moved"])
    assert active(client) == version
    told = [event for event in events(client, "drift") if event["slice"] == "turning"]
    assert "of slice 'turning' fell from" in told[0]["why"]
    assert moved["turning"]["before"] == pytest.approx(usual)
    assert moved["turning"]["fell_to"] < usual
    status = client.status()
    slices, lengths = status["acceptance_by_slice"], status["acceptance_by_prompt_tokens"]
    assert slices["steady"]["length"] > slices["turning"]["length"]
    assert sum(found["passes"] for found in lengths.values()) == status["acceptance"]["passes"]
    noted = json.loads((client.run_dir / "versions" / "manifest.json").read_text())["moved"]
    assert noted["turning"] > 0  # where the trainer reads it


def test_bad_requests_change_nothing_and_never_fail_in_the_server(client, drafts):
    for draft in drafts:
        add(client, draft)

    def draft():
        found = client.status()["draft"]
        return {key: found[key] for key in found.keys() - {"drift", "guard"}}  # these two change with time alone

    def changes():
        told = client.get("/draft/events?last=10000").json()
        return [event for event in told if not event["event"].startswith("drift")]

    before, heard = draft(), changes()
    document = client.get("/openapi.json").json()
    document["paths"] = {path: what for path, what in document["paths"].items() if path.startswith("/draft")}
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(modes=[GenerationMode.NEGATIVE], max_examples=15)
    tried = 0
    for operation in schema.get_all_operations():
        for case in cases(operation.ok(), 15):
            answer = case.call(base_url=client.server.url, timeout=60)
            assert answer.status_code < 500, f"{case.formatted_path} {case.body}: {answer.text}"
            tried += 1
    assert tried > 100
    assert draft() == before
    assert changes() == heard


def cases(operation, count):
    """Examples that break what the operation's page says."""
    found = []

    @hypothesis.settings(max_examples=count, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def collect(case):
        found.append(case)

    with suppress(SkipTest):  # nothing can be wrong with it
        collect()
    return found


def test_replicas_compare_drafts_at_the_same_time(start, drafts, reference):
    client = start("--dtype", "float32", training=NOTHING, dp=2)
    versions = [add(client, draft) for draft in drafts]
    plan = {"arms": versions, "window_s": 0.5, "min_passes": 20, "promote": True}
    with load(client, reference()):
        id = client.post("/draft/ab", json=plan).json()["id"]
        wait_for("both arms in service", lambda: served_at_once(client) == set(versions))
        ended = wait_for("a verdict", lambda: (r := client.get(f"/draft/ab/{id}").json())["state"] == "ended" and r)
    assert (ended["outcome"], ended["winner"], ended["promoted"]) == ("better", versions[1], True), ended["why"]
    assert served_at_once(client) == {versions[1]}


def served_at_once(client):
    states = client.get("/server_info").json()["internal_states"]
    return {state["draft_training"]["bank"]["active_version"] for state in states}


@pytest.fixture
def two_servers(start):
    flags = ("--dtype", "float32")
    return [start(*flags, training=NOTHING), start(*flags, training=NOTHING, beside=True)]


def lead(servers, drafts, *flags):
    """``sglang-specforge ab start`` of both drafts on these servers, with its output."""
    urls = [part for client in servers for part in ("--url", client.server.url)]
    arms = ["--a", drafts[0], "--b", drafts[1], "--window-s", 0.5, "--min-passes", 20]
    return subprocess.Popen(
        list(map(str, [*CLI, "ab", "start", *urls, *arms, *flags])),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_servers_compare_drafts_at_the_same_time_and_all_promote_the_winner(two_servers, drafts, reference):
    first, second = two_servers
    begun_at, together = [active(client) for client in two_servers], set()
    with load(first, reference()), load(second, reference()):
        leader = lead(two_servers, drafts, "--promote")
        while leader.poll() is None:
            together.add(tuple(active(client) for client in two_servers))
        assert leader.returncode == 0, leader.stdout.read()
    contents = [{v["version"]: v["sha256"] for v in c.get("/draft/versions").json()} for c in two_servers]
    trained = content_of(drafts[1])
    assert [content[active(client)] for content, client in zip(contents, two_servers, strict=True)] == [trained] * 2
    apart = {pair for pair in together if contents[0][pair[0]] != contents[1][pair[1]]}
    assert len(apart) >= 2  # each of them with each arm
    for client, before in zip(two_servers, begun_at, strict=True):
        (joined,), (left,) = events(client, "ab_joined"), events(client, "ab_left")
        assert left["promoted"] == active(client) != before
        assert left["leader"] == joined["leader"]
        assert "commits most tokens a verification (better)" in left["why"]


def test_a_leader_that_is_killed_leaves_no_server_with_an_arm_of_its(two_servers, drafts, reference):
    before = [active(client) for client in two_servers]
    leader = lead(two_servers, drafts, "--smallest-difference", 1e-6, "--alpha", 1e-9)
    with load(two_servers[0], reference()), load(two_servers[1], reference()):
        wait_for("another version in service", lambda: [active(client) for client in two_servers] != before)
        refused = command(two_servers[1], "activate", before[1], code=1)
        assert "decides which draft is active" in refused
        leader.kill()
        wait_for("they are let go", lambda: not any(c.status()["draft"]["held_by"] for c in two_servers))
    assert [active(client) for client in two_servers] == before
    assert all("was not heard of" in events(client, "ab_left")[-1]["why"] for client in two_servers)


@pytest.mark.slow
def test_where_one_server_is_taken_none_takes_part_and_the_reason_is_told(two_servers, drafts):
    before = [active(client) for client in two_servers]
    arms = [add(two_servers[1], draft) for draft in drafts]
    id = two_servers[1].post("/draft/ab", json={"arms": arms}).json()["id"]
    leader = lead(two_servers, drafts)
    output, _ = leader.communicate(timeout=120)
    assert (leader.returncode, f"ab/{id} decides which draft is active" in " ".join(output.split())) == (1, True)
    command(two_servers[1], "ab", "stop", id)
    assert [active(client) for client in two_servers] == before
    assert not any(client.status()["draft"]["held_by"] for client in two_servers)


@pytest.fixture
def two_ranks(start, drafts, monkeypatch):
    customize_servers(monkeypatch, "faults")
    return start("--dtype", "float32", training=NOTHING | {"bank_on": "host", "bank_load_max_mb_s": 100}, tp=2)


def test_output_is_the_target_s_through_200_swaps_an_ab_and_a_rollback_of_two_ranks(two_ranks, drafts, reference):
    versions = [add(two_ranks, draft) for draft in drafts]
    # The hardly trained one is right once in about a hundred passes: enough of them for both arms to be above 1.
    plan = {"arms": versions, "window_s": 0.5, "min_passes": 200, "max_blocks": 3}
    with load(two_ranks, reference()):
        swap_200_times(two_ranks, versions)
        assert active(two_ranks) == versions[1]
        id = two_ranks.post("/draft/ab", json=plan).json()["id"]
        ended = wait_for("a verdict", lambda: (r := two_ranks.get(f"/draft/ab/{id}").json())["state"] == "ended" and r)
        assert all(arm["acceptance_length"] > 1 for arm in ended["arms"])
        assert active(two_ranks) == versions[1]
        assert two_ranks.post("/draft/rollback", json={}).json()["version"] == versions[0]
    assert active(two_ranks) == versions[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_load_a_version_leaves_every_rank_on_the_old_one(two_ranks, drafts, tmp_path, rank):
    _, trained = (add(two_ranks, draft) for draft in drafts)
    two_ranks.post("/draft/activate", json={"version": trained})
    length = live_length(two_ranks, trained)
    shutil.copytree(drafts[0], tmp_path / "faulty")
    config = json.loads((drafts[0] / "config.json").read_text())
    (tmp_path / "faulty" / "config.json").write_text(json.dumps({**config, "fails_on_rank": rank}))
    answer = two_ranks.post("/draft/versions", json={"path": str(tmp_path / "faulty")})
    assert answer.status_code == 422
    assert ("no memory is left" if rank == 0 else "rank 1 cannot load it") in answer.json()["message"]
    assert active(two_ranks) == trained
    assert live_length(two_ranks, trained) == pytest.approx(length, rel=0.1)  # of two ranks' parts of one draft


def test_a_rank_killed_while_drafts_change_leaves_one_version_after_a_restart(two_ranks, drafts):
    half, trained = (add(two_ranks, draft) for draft in drafts)
    lengths = {}
    for version in (half, trained):
        two_ranks.post("/draft/activate", json={"version": version})
        lengths[version] = live_length(two_ranks, version)
    assert lengths[half] < 0.9 * lengths[trained]
    ranks = [p for p in psutil.Process(two_ranks.server.process.pid).children(True) if "TP1" in " ".join(p.cmdline())]
    ended = threading.Event()

    def keep_swapping():
        while not ended.is_set():
            for version in (half, trained):
                try:
                    two_ranks.post("/draft/activate", json={"version": version}, timeout=5)
                except httpx.HTTPError:
                    return

    heard = len(events(two_ranks, "activated"))
    thread = threading.Thread(target=keep_swapping)
    thread.start()
    wait_for("swaps under way", lambda: len(events(two_ranks, "activated")) > heard + 3)
    os.kill(ranks[0].pid, signal.SIGKILL)
    wait_for("the server's end", lambda: two_ranks.server.process.poll() is not None)
    ended.set()
    thread.join()
    two_ranks.server.restart()
    version = active(two_ranks)
    assert version in lengths
    assert live_length(two_ranks, version) == pytest.approx(lengths[version], rel=0.1)
