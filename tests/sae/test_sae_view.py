"""The server behind the page: answers against the arrays, who may ask, labels that survive, a model in the loop."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actshuffle
import saetrain
from saetrain.cli import main
from saetrain.cli.view import _live
from saetrain.errors import ConfigError, DataError
from saetrain.probing.generation import Sampler, generate, prompt_tokens, stream
from saetrain.probing.turning import Steering, Turn
from saetrain.sae import SAE
from saetrain.sharing.export import export_features
from saetrain.sharing.naming import Names
from saetrain.view.labels import Labels
from saetrain.view.lists import Lists
from saetrain.view.live import Live
from saetrain.view.pairs import Pairs
from saetrain.view.server import TOKEN_HEADER, Server
from saetrain.view.site import Site
from support.causal import WORDS, saved, tiny
from support.causal import dictionary as random_dictionary
from support.features import LATENTS, TINY, dictionary, store


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    store(folder / "acts.zarr", gradient=True)
    dictionary(folder / "dictionary", "topk")
    saetrain.build_features(folder / "dictionary", folder / "acts.zarr", folder / "out", fsync=False, **TINY)
    return folder / "out"


@pytest.fixture
def site(result: Path, tmp_path: Path) -> Site:
    return Site(saetrain.open_features(result), Labels(tmp_path / "labels.json"))


@pytest.fixture
def server(site: Site) -> Iterator[Server]:
    made = Server(site)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and answer; headers are given with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, sent)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    kind = response.getheader("Content-Type", "")
    return response.status, json.loads(raw) if kind.startswith("application/json") else raw


def test_a_latent_is_what_the_reader_gives(server: Server, site: Site) -> None:
    f = site.features[4]
    status, found = ask(server, "GET", "/api/feature/4")
    assert status == 200
    assert found["count"] == f.count > 0
    assert found["density"] == {"value": f.density.value, "low": f.density.low, "high": f.density.high}
    assert found["loss"] == dict(zip(("value", "low", "high"), f.loss_effect, strict=True))
    assert found["histogram"]["counts"] == f.histogram.counts.tolist()
    assert [e["row"] for e in found["examples"]] == [e.row for e in f.top(8)]
    assert [t["id"] for t in found["tokens"]] == [t.id for t in f.top_tokens]
    kinds = ask(server, "GET", "/api/facts")[1]["kinds"]
    assert kinds == [*site.features.kinds, "hard"], "rows on which a near latent is active, and this one is not"
    for kind in kinds:
        told = ask(server, "GET", f"/api/examples/4/{kind.replace(' ', '%20')}")[1]["examples"]
        assert [(e["row"], e["at"], len(e["tokens"]), e["repeated"]) for e in told] == [
            (e.row, e.at, len(e.tokens), e.is_repeated) for e in f.examples(kind)
        ]
    assert ask(server, "GET", "/api/feature/3")[1]["dead"] is True


def test_answers_on_a_kept_connection_wait_for_no_acknowledgement(server: Server) -> None:
    """Headers and body in two writes take 40 ms from the second answer on, which is how a browser asks."""
    for _ in range(20):  # on a busy machine all of some connection's answers may take as long
        connection, seconds, served = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120), [], []
        for _ in range(10):
            began = time.perf_counter()
            connection.request("GET", "/api/feature/4")
            response = connection.getresponse()
            response.read()
            seconds.append(time.perf_counter() - began)
            served.append(float(str(response.getheader("Server-Timing")).removeprefix("answer;dur=")) / 1000)
        connection.close()
        assert all(0 <= inside <= whole for inside, whole in zip(served, seconds, strict=True))
        if min(seconds[1:]) < 0.03:
            break
    assert min(seconds[1:]) < 0.03


def test_overview_counts_every_live_latent_once(server: Server, site: Site) -> None:
    found = ask(server, "GET", "/api/overview")[1]
    counts = site.features.array("stat/count")
    assert (found["latents"], found["alive"]) == (LATENTS, int((counts > 0).sum()))
    assert found["dense"] == int((site.features.array("stat/density") > 0.1).sum())
    for histogram in found["histograms"]:
        assert sum(histogram["counts"]) == found["alive"], histogram["name"]
        values = Lists(site.features).values(histogram["name"])[counts > 0]
        for low, high, count in zip(histogram["edges"], histogram["edges"][1:], histogram["counts"], strict=False):
            assert count == int(((values >= low) & (values < high)).sum()) or high == histogram["edges"][-1]


@pytest.mark.parametrize("falling", [0, 1])
def test_filters_and_orders_equal_plain_sorting(server: Server, site: Site, falling: int) -> None:
    density, most = (site.features.array(f"stat/{name}").astype(float) for name in ("density", "max"))
    alive = site.features.array("stat/count") > 0
    kept = [i for i in range(LATENTS) if alive[i] and 0.05 <= density[i] < 0.2]
    due = sorted(kept, key=lambda i: (-most[i] if falling else most[i], i))
    found = ask(server, "GET", f"/api/list?density=0.05,0.2&order=max&falling={falling}&start=2")[1]
    assert found["total"] == len(due)
    assert [item["id"] for item in found["items"]] == due[2:]
    beside = ask(server, "GET", f"/api/beside/{due[3]}?density=0.05,0.2&order=max&falling={falling}")[1]
    assert beside == {"previous": due[2], "next": due[4]}
    assert ask(server, "GET", "/api/beside/3")[1] == {"previous": 2, "next": 4}, "a dead one lies between live ones"


def test_search_by_number_label_and_token(server: Server, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.features, "text", lambda ids: tuple(f" Word{i}" for i in ids))
    site.labels.put(6, "The colour red")
    assert [item["id"] for item in ask(server, "GET", "/api/search?q=12")[1]["number"]] == [12]
    assert [item["id"] for item in ask(server, "GET", "/api/search?q=COLOUR")[1]["label"]] == [6]
    found = {item["id"]: item["weight"] for item in ask(server, "GET", "/api/search?q=word2")[1]["token"]}
    ids, counts = site.features.array("token/id"), site.features.array("token/count")
    due = {
        i: counts[i, j] / site.features.array("stat/count")[i]
        for i in range(LATENTS)
        for j in np.flatnonzero(ids[i] == 2)
    }
    assert found == pytest.approx(due)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_dead_ones_have_a_list_and_labels_a_file(server: Server, site: Site) -> None:
    dead = np.flatnonzero(site.features.array("stat/count") == 0).tolist()
    found = ask(server, "GET", "/api/list?dead=1")[1]
    assert [item["id"] for item in found["items"]] == dead != []
    site.labels.put(6, "the colour <red>")
    assert ask(server, "GET", "/labels.json") == (200, {"format": 1, "labels": {"6": "the colour <red>"}})
    assert json.loads(site.labels.path.read_text()) == ask(server, "GET", "/labels.json")[1]


# --- Interactions, and features for other pages -------------------------------------------------


@pytest.fixture(scope="module")
def product(result: Path) -> Path:
    folder = result.parent
    saetrain.interactions(folder / "dictionary", folder / "dictionary", folder / "product", k=4, thresholds=[0.5])
    return folder / "product"


def test_interactions_are_those_of_the_store(server: Server, site: Site, product: Path) -> None:
    w = saetrain.open_interactions(product)
    site.products = [Pairs(w, [site.features])]
    facts = ask(server, "GET", "/api/facts")[1]["interactions"][0]
    assert facts["here"] == ["rows", "columns"]
    assert facts["halves"]["rows"]["kept"] == w.kept["rows"]
    for half, lines in (("rows", w.rows), ("columns", w.columns)):
        due, found = lines[5], ask(server, "GET", f"/api/interactions/0/{half}/5")[1]
        for end in ("top", "bottom"):
            assert [e["id"] for e in found[end]] == getattr(due, f"{end}_index").tolist()
            assert [e["value"] for e in found[end]] == getattr(due, f"{end}_value").tolist()
        assert [found[name] for name in ("kept", "energy", "sum", "entries")] == [
            due.kept, due.energy, due.sum, due.length,
        ]  # fmt: skip
        assert found["over"] == [[0.5, due.over[0.5]]]
        assert found["rest"] == dict(zip(("count", "mean", "std"), due.rest, strict=True))
        kept = lines.arrays["kept"][:]
        listed = ask(server, "GET", f"/api/interactions/0/{half}?order=kept&falling=1")[1]
        assert [item["id"] for item in listed["items"]] == sorted(range(LATENTS), key=lambda i: (-kept[i], i))
        assert sum(listed["histogram"]["counts"]) == listed["total"] == LATENTS
    assert ask(server, "GET", "/api/interactions/0/rows?start=38")[1]["items"][0]["id"] == 38
    for path in ("0/rows/40", "1/rows", "0/cells", "0/rows?order=colour", "x/rows"):
        assert ask(server, "GET", f"/api/interactions/{path}")[0] == 400


def test_sides_are_described_by_the_result_of_their_dictionary(site: Site, product: Path, tmp_path: Path) -> None:
    other = saetrain.open_features(site.features.path)
    other.facts = other.facts | {"dictionary": str(tmp_path)}
    pairs = Pairs(saetrain.open_interactions(product), [other])
    assert pairs.here == []
    assert pairs.line("rows", 5)["tokens"] == []
    pairs = Pairs(saetrain.open_interactions(product), [other, site.features])
    assert pairs.here == []
    assert pairs.line("rows", 5)["tokens"] == site.line(5)["tokens"][:4] != []


def test_features_for_other_pages_are_those_of_the_export(server: Server, site: Site, tmp_path: Path) -> None:
    export_features(site.features.path, tmp_path / "export", "graph", names=Names("m", 1, "out"))
    files = {path.name: path for path in (tmp_path / "export").rglob("*.json") if path.stem.isdigit()}
    assert len(files) > 30
    for number in range(LATENTS):
        status, found = ask(server, "GET", f"/features/out/{number}.json")
        if f"{number}.json" not in files:
            assert status == 404
            continue
        due = json.loads(files[f"{number}.json"].read_text())
        assert found == due | {"transcoder_id": "out"}
    for path in ("/features/other/4.json", "/features/out/40.json", "/features/out/4", "/features/out"):
        assert ask(server, "GET", path)[0] == 404


def test_only_pages_that_were_named_may_read_features(server: Server, site: Site) -> None:
    def allowed(origin: str, path: str = "/features/out/4.json") -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
        connection.request("GET", path, headers={"Origin": origin})
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.getheader("Access-Control-Allow-Origin")

    assert allowed("http://localhost:8041") is None
    site.origins = frozenset({"http://localhost:8041"})
    assert allowed("http://localhost:8041") == "http://localhost:8041"
    assert allowed("http://localhost:8042") is None
    assert allowed("http://localhost:8041", "/api/feature/4") is None


@pytest.mark.parametrize("given", ["localhost", "*", "ftp://a", "http://a/b", "http://"])
def test_an_origin_is_scheme_host_and_port(given: str, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(result), "--no-open", "--port", "0", "--allow-origin", given]) == 2
    assert "--allow-origin" in capsys.readouterr().err


# --- Who may ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost:1", "evil.example:80", ""])
def test_another_host_is_refused_for_reading_too(server: Server, host: str) -> None:
    assert ask(server, "GET", "/api/facts", Host=host)[0] == 421
    assert ask(server, "GET", "/", Host=host)[0] == 421
    assert ask(server, "GET", "/api/facts", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize(("method", "path"), [("PUT", "/api/label/4"), ("POST", "/api/text"), ("POST", "/api/steer")])
def test_a_request_without_the_token_writes_nothing(server: Server, site: Site, method: str, path: str) -> None:
    for given in ({}, {TOKEN_HEADER.replace("-", "_"): "guess"}):
        assert ask(server, method, path, {"label": "mine", "text": "a"}, **given)[0] == 403
    assert not site.labels.path.exists()


def test_the_page_has_the_token_and_fetches_nothing_from_elsewhere(server: Server) -> None:
    status, page = ask(server, "GET", "/feature/4")
    assert status == 200
    assert server.token.encode() in page
    for name, data in server.files.items():
        assert b"http://" not in data.replace(b"http://www.w3.org", b""), name
        assert b"https://" not in data, name
        assert b"innerHTML" not in data, name
    for path in ("/static/app.js", "/static/style.css", "/favicon.ico"):
        assert ask(server, "GET", path)[0] == 200
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/server.py", "/static/nothing.js"):
        assert ask(server, "GET", path)[0] == 404


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/feature/40", 400, "no feature 40: there are 0 to 39"),
        ("/api/feature/-1", 400, "a whole number is needed"),
        ("/api/feature/x", 400, "a whole number is needed"),
        ("/api/examples/4/best", 400, "no examples of kind 'best'"),
        ("/api/list?order=colour", 400, "no order 'colour'"),
        ("/api/list?density=1", 400, "a filter is two numbers"),
        ("/api/list?colour=1,2", 400, "no quantity 'colour'"),
        ("/api/compare?ids=1,2,3,4,5", 400, "1 to 4 features"),
        ("/api/metrics", 400, "start the page with `saetrain view FEATURES --run RUN`"),
        ("/api/nothing", 404, "nothing"),
    ],
)
def test_bad_questions_get_one_sentence(server: Server, path: str, status: int, words: str) -> None:
    found = ask(server, "GET", path)
    assert found[0] == status
    assert words in found[1]["error"]


@pytest.mark.parametrize(("body", "size"), [(b"", 0), (b"[]", 2), (b"{", 1), (b"{}", (1 << 20) + 1), (b"{}", -2)])
def test_bad_bodies_are_refused(server: Server, body: bytes, size: int) -> None:
    given = {TOKEN_HEADER.replace("-", "_"): server.token, "Content_Length": str(size)}
    assert ask(server, "POST", "/api/text", body, **given)[0] == 400
    assert ask(server, "GET", "/api/facts")[0] == 200


# --- Labels -------------------------------------------------------------------------------------


def test_labels_survive_and_are_merged(server: Server, site: Site) -> None:
    given = {TOKEN_HEADER.replace("-", "_"): server.token}
    hostile = "<img src=x onerror=alert(1)>"
    assert ask(server, "PUT", "/api/label/4", {"label": f"  {hostile} "}, **given)[1] == {"id": 4, "label": hostile}
    other = Labels(site.labels.path)
    assert other.all() == {4: hostile}
    other.put(5, "another page's")
    ask(server, "PUT", "/api/label/6", {"label": "third"}, **given)
    assert Labels(site.labels.path).all() == {4: hostile, 5: "another page's", 6: "third"}
    ask(server, "PUT", "/api/label/4", {"label": ""}, **given)
    assert Labels(site.labels.path).all() == {5: "another page's", 6: "third"}
    assert ask(server, "PUT", "/api/label/99", {"label": "x"}, **given)[0] == 400
    assert ask(server, "PUT", "/api/label/4", {"label": "x" * 501}, **given)[0] == 400
    assert [path.name for path in site.labels.path.parent.iterdir()] == ["labels.json"]


def test_a_label_that_cannot_be_saved_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = Labels(tmp_path / "labels.json")
    labels.put(1, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saetrain.writing.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        labels.put(2, "new")
    assert Labels(tmp_path / "labels.json").all() == labels.all() == {1: "old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9, "labels": {}}', '{"format": 1, "labels": {"x": "y"}}'])
def test_another_file_is_not_taken_for_labels(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(DataError, match=r"labels\.json"):
        Labels(tmp_path / "labels.json")


# --- The model ----------------------------------------------------------------------------------


@pytest.fixture
def live() -> Live:
    return Live(random_dictionary(), tiny(), 4.0)


def test_features_of_a_text_equal_the_dictionary_on_its_hidden_states(live: Live) -> None:
    text = "red dog house"
    found = live.text(text)
    tokens = live.model.tokens_of(text)
    before = live.model.special_tokens()[0]
    acts = live.sae.encode(live.model.hidden(torch.tensor([before + tokens]))[0, len(before) :])
    assert found["tokens"] == [live.model.text_of([t]) for t in tokens]
    for row, held in zip(acts, found["features"], strict=True):
        due = row.topk(6)
        assert [i for i, _ in held] == [int(i) for i, v in zip(due.indices, due.values, strict=True) if v > 0]
    best = found["whole"][0]
    assert best["value"] == pytest.approx(float(acts.max()))
    assert best["acts"] == pytest.approx(acts[:, best["id"]].tolist(), abs=1e-4)
    for bad in ("", "red " * 2000):
        with pytest.raises(ConfigError, match="tokens"):
            live.text(bad)


def test_a_text_is_read_as_the_store_was_collected(tmp_path: Path) -> None:
    """Behind the prefix, and without rows beyond the multiple of the median norm."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 3))
    model = saved(tmp_path / "model")
    actshuffle.collect(str(model), [text], tmp_path / "acts.zarr", layers=[2], prefix="<s>", drop_norm=1.4)
    random_dictionary().save(tmp_path / "sae")
    saetrain.build_features(tmp_path / "sae", tmp_path / "acts.zarr", tmp_path / "out", field="layer_2", fsync=False)
    features = saetrain.open_features(tmp_path / "out")
    named = {"model": str(model), "layer": 2, "tokenizer": None, "model_dtype": "float32", "device": "cpu"}
    live = _live(features, named)
    assert live is not None
    assert live.prefix == [1]
    assert live.limit == 1.4 * (features.median_norm or 0)
    asked = "w3 w9 w17 w30 w41 w5 w22 w8"
    found = live.text(asked)
    x = live.model.hidden(torch.tensor([[1, *live.model.tokens_of(asked)]]))[0, 1:]
    heavy = (x.norm(dim=1) > live.limit).nonzero()[:, 0].tolist()
    assert found["heavy"] == heavy
    assert 0 < len(heavy) < 8
    acts = live.sae.encode(x)
    for at, held in enumerate(found["features"]):
        due = [] if at in heavy else [int(i) for i in acts[at].topk(6).indices if acts[at, i] > 0]
        assert [i for i, _ in held] == due


def test_steered_text_is_that_of_the_steering_itself(live: Live) -> None:
    turn = {"feature": 5, "method": "clamp", "value": 0.5, "unit": "norm"}
    asked = {"turns": [turn], "prompt": "red dog", "tokens": 8, "repetition": 1.0}
    pieces = list(live.steer(asked, {}))
    assert pieces[-1]["which"] == "end"
    written = {which: "".join(p["text"] for p in pieces if p["which"] == which) for which in ("plain", "steered")}
    prompt = prompt_tokens(live.model, "red dog")
    amount = 0.5 * 4.0 / float(live.sae.W_dec[5].norm())
    first = max(1, len(live.model.special_tokens()[0]))
    edits = {"plain": None, "steered": Steering(live.sae, [Turn(5, "clamp", amount)], first=first)}
    for which, edit in edits.items():
        assert written[which] == "".join(
            stream(live.model, generate(live.model, prompt, edit=edit, tokens=8, sampler=Sampler()))
        )
    assert written["plain"] != written["steered"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"turns": []}, "no feature to turn"),
        ({"turns": [{"feature": 999, "value": 1}]}, "no feature 999"),
        ({"turns": [{"feature": 1}]}, "no request to steer"),
        ({"turns": [{"feature": 1, "value": 1, "unit": "max"}]}, "largest activation"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": "many"}, "no request to steer"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_the_first_piece(
    live: Live, change: dict[str, Any], words: str
) -> None:
    asked = {"turns": [{"feature": 5, "value": 0.5}], "prompt": "red dog", "tokens": 4} | change
    with pytest.raises(ConfigError, match=words):
        live.steer(asked, {})


def test_steering_over_http_comes_line_by_line(site: Site, live: Live) -> None:
    sae = SAE("relu", *(torch.zeros(s) for s in ((LATENTS, 16), (LATENTS,), (LATENTS, 16), (16,))), True)
    site.live = Live(sae, live.model, 4.0)
    server = Server(site)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    given = {TOKEN_HEADER.replace("-", "_"): server.token}
    body = {"turns": [{"feature": 4, "method": "ablate", "value": 0}], "prompt": "red", "tokens": 3}
    status, raw = ask(server, "POST", "/api/steer", body, **given)
    lines = [json.loads(line) for line in raw.splitlines()]
    assert status == 200
    assert {line["which"] for line in lines} == {"plain", "steered", "end"}
    assert ask(server, "POST", "/api/steer", {**body, "tokens": 0}, **given)[0] == 400
    for turns in ([{"feature": None}], [{"feature": "dog"}]):
        status, found = ask(server, "POST", "/api/steer", {**body, "turns": turns}, **given)
        assert (status, found["error"]) == (400, "each feature that is turned is given by its number")
    server.shutdown()
    server.server_close()


def test_the_median_norm_is_that_of_rows_from_all_over_the_store(result: Path) -> None:
    features = saetrain.open_features(result)
    data = features.store
    assert data is not None
    assert features.median_norm == pytest.approx(
        float(np.median(np.linalg.norm(data.read("x", 0, data.rows), axis=1))), rel=0.05
    )


def test_a_port_that_is_taken_is_named(server: Server, site: Site) -> None:
    with pytest.raises(ConfigError, match=f"port {server.server_port} of 127.0.0.1 cannot be used"):
        Server(site, server.server_port)
