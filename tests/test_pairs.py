"""`evaluate.py pairs`: what goes on the page, and the page in a real browser: 200 pairs judged, nothing lost, hostile
answers harmless, without a network."""

import base64
import json
import random
import re
import time
from pathlib import Path

import pytest
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.browser import open_browser, requested_addresses
from support.helpers import command

import evaluate
from common.errors import UserError
from evals import pairwise, tally

RIGHT, LEFT = Keys.ARROW_RIGHT, Keys.ARROW_LEFT
HOSTILE = [
    "</script><script>window.ran = 1</script>",
    "<!--<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran=1'><svg onload=window.ran=1>",
    "]]>--></title></textarea></style><style>*{display:none}</style>",
    '<a href="javascript:window.ran=1">a</a>&lt;b&gt;&amp;amp;&#60;i',
    "{{ 7 * 7 }}{% raw %}${window.ran = 1}`\\u003cscript>",
    "line\u2028separator\u2029paragraph\r\nreturn\ttab\x00nul\x1b[31mred\x7f",
    "\u202eright to left\u202c \u2067isolate \u200f\u202b never closed \u202e",
    "\ud800 half of a pair \udc00",
    "河は流れる 👩‍👩‍👧 é e\u0301 \u200b\ufeff",
    "w" * 5000,
    "",
    " \n\t ",
    "__proto__",
]


def write_answers(path: Path, texts: list[str], **fields) -> Path:
    """A file as `generate.py --data` writes it. fields: of every line, or a function of its number."""
    lines = []
    for i, text in enumerate(texts):
        line = {"record": i + 1, "source": f"q.jsonl line {i + 1}"}
        asked = {"role": "user", "content": f"question {i + 1}"}
        line["messages"] = [asked, {"role": "assistant", "content": text}]
        line |= {key: value(i) if callable(value) else value for key, value in fields.items()}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def two_files(folder: Path, count: int = 12) -> tuple[Path, Path]:
    a = write_answers(folder / "smallbase.jsonl", [f"an answer {i}" for i in range(count)])
    return a, write_answers(folder / "mytuned.jsonl", [f"another answer {i}" for i in range(count)])


def make_page(*words) -> dict:
    """Makes a page; returns the data in it."""
    args = pairwise.pairs_arguments([str(word) for word in words])
    pairwise.make_pairs_page(args)
    return page_data(args.out)


def page_data(page: Path) -> dict:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text("ascii"))
    return json.loads(text)


def key_of(data: dict) -> dict:
    return json.loads(base64.b64decode(data["key"]))


# ---- what goes on the page ----


def test_what_the_command_prints(tmp_path, monkeypatch, capsys):
    a, b = two_files(tmp_path, 12)
    write_answers(b, [f"another answer {i}" for i in range(9)] + ["an answer 9", "an answer 10"])
    page = tmp_path / "page.html"
    out, err, code = command(evaluate, monkeypatch, capsys, "pairs", a, b, "--out", page)
    assert (err, code) == ("", 0)
    left_out = "2 whose two answers are identical left out; 1 answers that only the first file has left out"
    assert out.splitlines()[:3] == [
        f"smallbase {a}: 12 answers",
        f"mytuned   {b}: 11 answers",
        f"pairs     9 to be judged ({left_out})",
    ]
    assert out.splitlines()[3].startswith(f"page      {page}, 0.0 MB, number {page_data(page)['page']}; ")


def test_sides_are_random_by_the_seed_and_balanced_from_the_first_pairs_on(tmp_path):
    a, b = two_files(tmp_path, 100)
    pages = [make_page(a, b, "--out", tmp_path / "p", "--overwrite", "--seed", seed) for seed in (0, 0, 1)]
    sides = [key_of(data)["sides"] for data in pages]
    assert sides[0] == sides[1] != sides[2]
    assert pages[0] == pages[1] and pages[0]["page"] != pages[2]["page"]
    for chosen in sides:
        assert {chosen[i : i + 10].count("A") for i in range(0, 100, 10)} == {5}
    starts = {pairwise.random_sides(1, seed) for seed in range(20)}
    assert starts == {"A", "B"}
    for side, pair in zip(sides[0], pages[0]["pairs"], strict=True):
        own, other = ("left", "right") if side == "A" else ("right", "left")
        assert pair[own]["text"].startswith("an answer") and pair[other]["text"].startswith("another")


def test_answers_are_joined_by_record_and_sample_not_by_their_order(tmp_path):
    a = write_answers(tmp_path / "a.jsonl", ["a1", "a2", "a3"])
    lines = write_answers(tmp_path / "b.jsonl", ["b1", "b2", "b3"]).read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\n\n".join(reversed(lines)))
    data = make_page(a, tmp_path / "b.jsonl", "--out", tmp_path / "p")
    for number, pair in enumerate(data["pairs"], 1):
        assert {pair["left"]["text"], pair["right"]["text"]} == {f"a{number}", f"b{number}"}
    samples = {"record": lambda i: i // 2 + 1, "sample": lambda i: i % 2 + 1}
    ask = {"messages": lambda i: [{"role": "user", "content": f"q{i // 2}"}, {"role": "assistant", "content": f"s{i}"}]}
    c = write_answers(tmp_path / "c.jsonl", [""] * 4, **samples, **ask)
    d = tmp_path / "d.jsonl"
    d.write_text(c.read_text().replace('"content": "s', '"content": "t'))
    data = make_page(c, d, "--out", tmp_path / "p2")
    assert key_of(data)["records"] == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert [{pair["left"]["text"][1:], pair["right"]["text"][1:]} for pair in data["pairs"]] == [{c} for c in "0123"]


def test_a_limit_draws_pairs_and_keeps_the_share_of_identical_ones(tmp_path):
    a = write_answers(tmp_path / "a.jsonl", [f"a{i}" for i in range(400)])
    b = write_answers(tmp_path / "b.jsonl", [f"a{i}" if i % 2 else "b" for i in range(400)])
    pages = [make_page(a, b, "--out", tmp_path / "p", "--overwrite", "--limit", 100, "--seed", s) for s in (0, 1)]
    first, second = map(key_of, pages)
    assert len(first["records"]) == 100 and first["records"] == sorted(first["records"]) != second["records"]
    assert all(record % 2 for record, _ in first["records"])
    # 100 of 200 that differ, so half of the 200 identical ones.
    assert first["identical"] == second["identical"] == 100
    kept = make_page(a, b, "--out", tmp_path / "p", "--overwrite", "--keep-identical")
    assert len(kept["pairs"]) == 400 and key_of(kept)["identical"] == 0
    with pytest.raises(UserError, match="--limit 201: there are only 200 pairs that differ"):
        make_page(a, b, "--out", tmp_path / "p3", "--limit", 201)


def test_conversations_tools_references_and_texts_are_shown(tmp_path):
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "part one"}, {"type": "image"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look_up"}]},
        {"role": "tool", "content": "result"},
    ]
    line = {"record": 7, "tools": [{"name": "look_up"}], "reference": "right", "finish": "length"}
    for name in "ab":
        whole = line | {"messages": [*asked, {"role": "assistant", "content": name}]}
        (tmp_path / name).write_text(json.dumps(whole))
    (pair,) = make_page(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "p")["pairs"]
    assert [turn["role"] for turn in pair["question"]] == ["tools", "system", "user", "assistant", "tool"]
    assert pair["question"][2]["text"] == 'part one\n{\n  "type": "image"\n}'
    assert '"name": "look_up"' in pair["question"][3]["text"]
    assert pair["reference"] == "right" and pair["left"]["was_cut"] is True
    for name in "ab":
        (tmp_path / name).write_text(json.dumps({"record": 1, "prompt": "Once", "completion": f" upon {name}"}))
    (pair,) = make_page(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "p2")["pairs"]
    assert pair["question"] == [{"role": "text to continue", "text": "Once"}]
    assert {pair["left"]["text"], pair["right"]["text"]} == {" upon a", " upon b"}


def test_system_messages_may_differ_and_are_not_shown_then(tmp_path, capsys):
    for name, system in (("a", "Be kind."), ("b", "I am the tuned one.")):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "q"}]
        messages.append({"role": "assistant", "content": name})
        (tmp_path / name).write_text(json.dumps({"record": 1, "messages": messages}))
    data = make_page(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "p")
    assert data["pairs"][0]["question"] == [{"role": "user", "text": "q"}]
    assert "NOTE: in 1 pairs the models had different system messages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "holds no answers; a file that `generate.py --data"),
        ("\n{", "line 2: is not JSON"),
        ("[1]", "line 1: is no JSON object"),
        ('{"messages": []}', "line 1: has no number as `record`"),
        ('{"record": true}', "line 1: has no number as `record`"),
        ('{"record": 1, "sample": "1"}', "line 1: has no number as `sample`"),
        ('{"record": 1}', "line 1: has neither `messages` nor `prompt` and `completion`"),
        ('{"record": 1, "messages": [{"role": "user", "content": "q"}]}', "line 1: its last message is not the assist"),
        ('{"record": 1, "prompt": "p", "completion": "c"}\n' * 2, "b.jsonl line 2: answers record 1 sample 1, as "),
        ("[" * 100_000, "line 1: is not JSON"),
        ('{"record": 1, "prompt": "question 1", "completion": "c"}', "record 1 is not the same prompt in both (1 such"),
        ('{"record": 99, "prompt": "p", "completion": "c"}', "have no record in common"),
    ],
)
def test_a_file_that_is_none_ends_with_one_line_and_nothing_written(tmp_path, monkeypatch, capsys, lines, said):
    a, b = two_files(tmp_path)
    b = tmp_path / "b.jsonl"
    b.write_text(lines)
    _, err, code = command(evaluate, monkeypatch, capsys, "pairs", a, b, "--out", tmp_path / "page.html")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jsonl", "mytuned.jsonl", "smallbase.jsonl"]


def test_other_prompts_are_named(tmp_path):
    a, b = two_files(tmp_path)
    b.write_text(a.read_text().replace("question", "other question"))
    said = "record 1 is not the same prompt in both (12 such: 1, 2, 3, 4, 5, ...); let both models answer one --data"
    with pytest.raises(UserError, match=re.escape(said)):
        make_page(a, b, "--out", tmp_path / "p")
    with pytest.raises(UserError, match="all 12 answers are the same in both, so there is nothing to judge"):
        b.write_text(a.read_text())
        make_page(a, b, "--out", tmp_path / "p")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--names", "one"], "--names one: two different names with a comma between are wanted"),
        (["--names", "x,x"], "--names x,x: two different names"),
        (["--names", "a\x1b,b"], "a name has at most 60 characters"),
        (["--limit", "0"], "--limit 0: must be 1 or more"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--sed", "1"], "--sed=1: no such flag; did you mean --seed?"),
        (["--out", "no/such/page.html"], "there is no such folder"),
        (["--out", "smallbase.jsonl"], "--out smallbase.jsonl: is there already; --overwrite replaces it"),
        (
            ["--out", "smallbase.jsonl", "--overwrite"],
            "--out smallbase.jsonl: is no page of pairs, which alone is replaced; give another name",
        ),
        (["--out", ".", "--overwrite"], "--out .: is a folder, the name of a file is wanted"),
    ],
)
def test_flags_that_are_wrong_are_named(tmp_path, monkeypatch, capsys, words, said):
    a, b = two_files(tmp_path)
    before = a.read_text()
    monkeypatch.chdir(tmp_path)
    _, err, code = command(evaluate, monkeypatch, capsys, "pairs", a.name, b.name, "--out", "page.html", *words)
    assert code == 2 and said in err.replace("--sed: no", "--sed=1: no") and err.count("\n") == 1
    assert a.read_text() == before and not (tmp_path / "page.html").exists()


def test_one_file_twice_and_files_of_one_name(tmp_path):
    a, b = two_files(tmp_path)
    with pytest.raises(UserError, match="is given twice; the answers of two models are wanted"):
        pairwise.pairs_arguments([str(a), str(a), "--out", "p"])
    other = tmp_path / "x"
    other.mkdir()
    b.rename(other / a.name)
    assert key_of(make_page(a, other / a.name, "--out", tmp_path / "p"))["names"] == [
        str(a)[-60:],
        str(other / a.name)[-60:],
    ]


# ---- the page in a browser ----


@pytest.fixture(scope="module")
def one_browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    browser = open_browser(folder / "profile", folder)
    yield browser
    browser.quit()


@pytest.fixture
def browser(one_browser, tmp_path):
    """The browser of all tests, as a fresh one: nothing saved, one tab, a folder for downloads of its own."""
    (tmp_path / "down").mkdir()
    where = {"behavior": "allow", "downloadPath": str(tmp_path / "down")}
    one_browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    (tmp_path / "empty.html").write_text("<title>empty</title>")
    first, *others = one_browser.window_handles
    for other in others:
        one_browser.switch_to.window(other)
        one_browser.close()
    one_browser.switch_to.window(first)
    one_browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    one_browser.set_window_size(1200, 900)
    one_browser.get((tmp_path / "empty.html").as_uri())
    one_browser.execute_script("localStorage.clear()")
    one_browser.get_log("browser")
    return one_browser


def page_of(folder: Path, count: int, *words) -> str:
    a, b = two_files(folder, count)
    make_page(a, b, "--out", folder / "page.html", *words)
    return (folder / "page.html").as_uri()


def press(browser, keys: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys(keys)


def text_of(browser, name: str) -> str:
    return browser.find_element(By.ID, name).text


def kept_by(browser) -> dict:
    """What the browser has saved of the page, and what the page says when it can't."""
    saved = browser.execute_script("return JSON.stringify(localStorage)")
    return {"saved": saved, "warning": text_of(browser, "warning")}


def click(browser, selector: str) -> None:
    """Clicks the first such element, in the middle of the window: the bar below would cover it at the end."""
    element = browser.find_element(By.CSS_SELECTOR, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def rate(browser, side: str, scale: str, value) -> None:
    click(browser, f"[data-side={side}][data-scale={scale}][data-value='{str(value).lower()}']")


def exported(browser, folder: Path) -> dict:
    """What Export saves."""
    click(browser, "#export")
    for _ in range(100):
        files = [path for path in folder.glob("judgements-*.json") if path.stat().st_size]
        if files:
            break
        time.sleep(0.05)
    (file,) = files
    content = json.loads(file.read_text())
    file.unlink()
    return content


def name_rater(browser, name: str) -> None:
    browser.find_element(By.ID, "rater").send_keys(name, Keys.ENTER)


def test_200_pairs_are_judged_and_nothing_is_lost(tmp_path):
    uri = page_of(tmp_path, 200, "--names", "base,tuned")
    down = tmp_path / "down"
    down.mkdir()
    source = random.Random(3)
    choices = [source.choice(["left", "right", "tie"]) for _ in range(200)]
    key = {"left": "1", "right": "2", "tie": "t"}
    browser = open_browser(tmp_path / "profile", down)
    try:
        browser.get(uri)
        name_rater(browser, "Ann Ö")
        press(browser, "".join(key[choice] + RIGHT for choice in choices[:50]))
        rate(browser, "left", "fluency", 4)
        assert (text_of(browser, "count"), text_of(browser, "number")) == ("50 of 200 judged", "Pair 51 of 200")
        browser.refresh()
        assert (text_of(browser, "count"), text_of(browser, "number")) == ("50 of 200 judged", "Pair 51 of 200")
        press(browser, "".join(key[choice] + RIGHT for choice in choices[50:100]))
        # The tab is closed at once, without a look back.
        browser.switch_to.new_window("tab")
        other = browser.current_window_handle
        browser.switch_to.window(browser.window_handles[0])
        press(browser, "".join(key[choice] + RIGHT for choice in choices[100:120]))
        browser.close()
        browser.switch_to.window(other)
        browser.get(uri)
        assert (text_of(browser, "count"), text_of(browser, "number")) == ("120 of 200 judged", "Pair 121 of 200")
        press(browser, "".join(key[choice] + RIGHT for choice in choices[120:150]))
    finally:
        browser.quit()
    browser = open_browser(tmp_path / "profile", down)
    try:
        browser.get(uri)
        assert text_of(browser, "count") == "150 of 200 judged"
        press(browser, "".join(key[choice] + RIGHT for choice in choices[150:]))
        assert (
            text_of(browser, "message") == "All pairs are judged. Press Export, and send the file to whoever asked you."
        )
        content = exported(browser, down)
        addresses = requested_addresses(browser)
    finally:
        browser.quit()
    assert content["rater"] == "Ann Ö"
    assert [each["pair"] for each in content["judgements"]] == list(range(1, 201))
    assert [each["choice"] for each in content["judgements"]] == choices
    assert content["judgements"][50]["ratings"]["left"] == {"fluency": 4}
    # Nothing but the page itself was asked for; the file that is exported is made in the browser.
    assert [each for each in addresses if not each.startswith("blob:")] == [uri]

    (tmp_path / "ann.json").write_text(json.dumps(content))
    raters, warnings = tally.read_raters([tmp_path / "ann.json"])
    assert warnings == []
    sides = key_of(page_data(tmp_path / "page.html"))["sides"]
    model = {("left", "A"): "A", ("right", "A"): "B", ("left", "B"): "B", ("right", "B"): "A"}
    expected = {
        i: model.get((choice, side), "tie") for i, (choice, side) in enumerate(zip(choices, sides, strict=True))
    }
    assert raters.choices("Ann Ö") == expected


def test_hostile_answers_are_text_and_nothing_else(tmp_path, browser):
    long = "<b>" * 1_000_000 + "end"
    texts = [*HOSTILE, long]
    roles = [
        {"messages": [{"role": text[:99], "content": text}, {"role": "assistant", "content": text}]} for text in texts
    ]
    fields = {"messages": lambda i: roles[i]["messages"], "reference": lambda i: texts[i]}
    a = write_answers(tmp_path / "a.jsonl", texts, **fields)
    for record in roles:
        record["messages"][-1]["content"] += "."
    b = write_answers(tmp_path / "b.jsonl", texts, **fields)
    data = make_page(a, b, "--out", tmp_path / "page.html")
    browser.set_window_size(500, 800)
    browser.get((tmp_path / "page.html").as_uri())
    count = "return document.querySelectorAll('script, img, svg, style, a, iframe').length"
    # In code units, since half of a pair is no text that could be sent.
    read = """const units = ({textContent: text}) => Array.from({length: text.length}, (_, i) => text.charCodeAt(i));
        return ['#left .text', '#right .text', '#question .text', '#question .role', '#reference-text'].map(
            (name) => units(document.querySelector(name)))"""
    for i, text in enumerate(texts[:-1]):
        pair = data["pairs"][i]
        shown = browser.execute_script(read)
        expected = [pair["left"]["text"], pair["right"]["text"], text, text[:99], text]
        for number in range(3):
            if expected[number].strip() == "":
                expected[number] = "(empty)" if expected[number] == "" else "(only spaces or line ends)"
        assert shown == [units(each) for each in expected], f"{text[:40]!r}"
        assert browser.execute_script(count) == 3
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), text[:40]
        press(browser, RIGHT)
    shown = browser.execute_script("return document.querySelector('#left .text').textContent.length")
    assert shown == 50_000
    assert browser.find_element(By.CSS_SELECTOR, "#left .more").text in (
        "Show all 3,000,003 characters",
        "Show all 3,000,004 characters",
    )
    browser.execute_script("document.querySelector('#left .more').click()")
    length = browser.execute_script("return document.querySelector('#left .text').textContent.length")
    assert length == len(data["pairs"][-1]["left"]["text"])
    press(browser, "1")
    assert text_of(browser, "count") == f"1 of {len(texts)} judged"
    assert browser.execute_script("return [window.ran ?? null, document.title]") == [None, "Which answer is better?"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def units(text: str) -> list[int]:
    """The UTF-16 code units of a text, as a browser has them."""
    data = text.encode("utf-16-le", "surrogatepass")
    return [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]


def test_the_policy_lets_nothing_run_load_or_send(tmp_path, browser):
    browser.get(page_of(tmp_path, 2))
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        browser.execute_script("document.body.innerHTML = '<b>x</b>'")
    added = browser.execute_async_script("""
        const done = arguments[0];
        const seen = [];
        document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
        const image = document.createElement("img");
        image.src = "https://example.org/x.png";
        const style = document.createElement("style");
        style.textContent = "* { display: none }";
        document.body.append(image, style);
        fetch("https://example.org/").catch(() => {});
        document.body.setAttribute("style", "display: none");
        setTimeout(() => done(seen.sort()), 300);
    """)
    assert added == ["connect-src", "img-src", "style-src-attr", "style-src-elem"]


def test_the_page_does_not_show_whose_answer_it_is(tmp_path, browser):
    browser.get(page_of(tmp_path, 4))
    source = (tmp_path / "page.html").read_text()
    assert "smallbase" not in source and "mytuned" not in source
    for _ in range(4):
        click(browser, "summary")
        shown = browser.execute_script("return document.body.innerText + document.title")
        assert "Answer 1" in shown and not re.search("smallbase|mytuned", shown)
        press(browser, "2" + RIGHT)


def test_ratings_success_clearing_and_moving(tmp_path, browser):
    uri = page_of(tmp_path, 5)
    browser.get(uri)
    pressed = "return [...document.querySelectorAll('[aria-pressed=true]')].map((each) => each.textContent.trim())"
    for side, scale, value in (("left", "accuracy", 5), ("right", "accuracy", 2), ("right", "helpfulness", 1)):
        rate(browser, side, scale, value)
    rate(browser, "right", "success", False)
    press(browser, "s1")
    assert browser.execute_script(pressed) == ["5", "Yes", "2", "1", "No", "1 Answer 1 is better"]
    rate(browser, "right", "helpfulness", 1)
    # After a rating was clicked, the keys still move, and change no rating.
    press(browser, RIGHT + RIGHT + "t" + LEFT)
    assert text_of(browser, "number") == "Pair 2 of 5" and browser.execute_script(pressed) == []
    press(browser, "dd" + "n")
    assert text_of(browser, "number") == "Pair 4 of 5"
    press(browser, "1n")
    assert text_of(browser, "number") == "Pair 5 of 5"
    press(browser, RIGHT + RIGHT + "n")
    assert text_of(browser, "number") == "Pair 2 of 5"
    press(browser, RIGHT)
    click(browser, "#clear")
    assert text_of(browser, "count") == "2 of 5 judged"
    click(browser, "#export")
    assert "Type your name first" in text_of(browser, "message")
    # Within the name the keys are letters.
    name_rater(browser, "12tsdn")
    content = exported(browser, tmp_path / "down")
    assert content["rater"] == "12tsdn"
    for each in content["judgements"]:
        assert abs(each.pop("at") / 1000 - time.time()) < 60
    ratings = {"left": {"accuracy": 5}, "right": {"accuracy": 2}}
    empty = {"left": {}, "right": {}}
    assert content["judgements"] == [
        {"pair": 1, "choice": "left", "ratings": ratings, "success": {"right": False, "left": True}},
        {"pair": 2, "choice": None, "ratings": empty, "success": {"right": False}},
        {"pair": 4, "choice": "left", "ratings": empty, "success": {}},
    ]
    assert text_of(browser, "message").endswith(".json. 3 pairs are not judged yet.")
    click(browser, "#advance")
    before = kept_by(browser)
    browser.refresh()
    # Once, on a crowded machine, nothing was there after the reload, and the failure did not say why.
    assert text_of(browser, "number") == "Pair 2 of 5", (
        f"kept before the reload: {before}, after it: {kept_by(browser)}"
    )
    press(browser, "1")
    assert text_of(browser, "number") == "Pair 3 of 5"


def test_export_and_import(tmp_path, browser):
    uri = page_of(tmp_path, 6)
    browser.get(uri)
    name_rater(browser, "ann")
    press(browser, f"1{RIGHT}2{RIGHT}t")
    first = exported(browser, tmp_path / "down")
    press(browser, "2")
    file = tmp_path / "first.json"
    chooser = browser.find_element(By.ID, "file")

    def import_file(content) -> str:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        chooser.send_keys(str(file))
        time.sleep(0.2)
        return text_of(browser, "message")

    said = import_file(first)
    assert said == "2 judgements imported from first.json. 1 that were changed here later are kept."
    assert import_file(first | {"rater": "bob"}).startswith(
        "first.json is by bob, and this page holds judgements by ann"
    )
    assert import_file(first | {"page": "0" * 16}).startswith("first.json holds judgements of another page (0000000")
    assert import_file("{").startswith("first.json holds no judgements that this page can read")
    assert [each["choice"] for each in exported(browser, tmp_path / "down")["judgements"]] == ["left", "right", "right"]
    click(browser, "#restart")
    browser.switch_to.alert.dismiss()
    assert text_of(browser, "count") == "3 of 6 judged"
    click(browser, "#restart")
    browser.switch_to.alert.accept()
    assert text_of(browser, "count") == "0 of 6 judged"
    bad = {"pair": 4, "choice": "<b>", "ratings": {"left": {"accuracy": 9}}, "success": {"left": "x"}, "at": 1}
    said = import_file(first | {"judgements": [*first["judgements"], bad, {"pair": 99}, {"pair": "length"}, None, 1]})
    assert said == "4 judgements imported from first.json."
    again = exported(browser, tmp_path / "down")
    assert again["judgements"][:3] == first["judgements"] and again["rater"] == "ann"
    empty = {"pair": 4, "choice": None, "ratings": {"left": {}, "right": {}}, "success": {}, "at": 1}
    assert again["judgements"][3] == empty


def test_two_tabs_with_the_page_don_t_undo_each_other(tmp_path, browser):
    uri = page_of(tmp_path, 4)
    browser.get(uri)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(uri)
    press(browser, f"{RIGHT}2")
    browser.switch_to.window(first)
    time.sleep(0.2)
    press(browser, "1")
    assert text_of(browser, "count") == "2 of 4 judged"
    browser.refresh()
    assert text_of(browser, "count") == "2 of 4 judged"


def test_where_the_browser_saves_nothing_the_page_says_so_and_works(tmp_path):
    uri = page_of(tmp_path, 2)
    (tmp_path / "down").mkdir()
    # The setting that blocks the data of all sites.
    block = {"profile__default_content_setting_values__cookies": 2}
    browser = open_browser(tmp_path / "profile", tmp_path / "down", **block)
    try:
        browser.get(uri)
        said = "This browser saves nothing for this page. Export your judgements before you close or reload it."
        assert text_of(browser, "warning") == said
        name_rater(browser, "ann")
        press(browser, f"1{RIGHT}2")
        content = exported(browser, tmp_path / "down")
        assert [each["choice"] for each in content["judgements"]] == ["left", "right"]
    finally:
        browser.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_page_fits_narrow_and_wide_and_is_readable_in_light_and_dark(tmp_path, browser, scheme, width):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page_of(tmp_path, 3))
    press(browser, RIGHT + "1")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    boxes = browser.execute_script("""
        return [...document.querySelectorAll("button:not([hidden]), input[type=text]")].map((each) => {
            const box = each.getBoundingClientRect();
            return [each.textContent, box.left, box.right];
        })""")
    assert len(boxes) > 30
    for name, left, right in boxes:
        assert 0 <= left <= right <= width, name
    colors = browser.execute_script("""
        return ["#left .text", ".quiet", "button.link", "[data-choice=left]", "[data-choice=tie]", "h3"].map((name) => {
            let node = document.querySelector(name);
            const ink = getComputedStyle(node).color;
            while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
            return [name, ink, getComputedStyle(node).backgroundColor];
        })""")
    for name, ink, page in colors:
        assert contrast(ink, page) >= 4.5, (name, ink, page)  # WCAG 2, level AA
    is_dark = luminance(colors[0][2]) < 0.2
    assert is_dark == (scheme == "dark")


def luminance(color: str) -> float:
    """Of a color as browsers write it, rgb(...): WCAG's relative luminance."""
    parts = []
    for text in re.findall(r"\d+", color)[:3]:
        part = int(text) / 255
        parts.append(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
