"""Questions become messages: placeholders, options, suffixes, and templates that are wrong."""
import pytest

from sophiavl_fast.data import templates
from sophiavl_fast.errors import UserError


def user(name: str, problem: str = "How many?", images: int = 0, **kwargs) -> list[dict]:
    return templates.load(name).messages(problem, **({"problem_type": "numerical"} | kwargs), images=images)[-1]["content"]


@pytest.mark.parametrize("name", ["sophia", "sophia_released", "plain"])
@pytest.mark.parametrize("kind", templates.TYPES)
def test_packaged_templates_render_every_type(name, kind):
    template = templates.load(name)
    found = template.messages("How many?", problem_type=kind, options=["one", "two"] if kind == "multiple_choice" else [], images=1)
    text = found[-1]["content"][-1]["text"]
    assert text.startswith("How many?") and ("two" in text) == (kind == "multiple_choice")
    assert [m["role"] for m in found] == (["user"] if name == "plain" else ["system", "user"])
    assert name == "plain" or (template.suffix[kind] in text and len(set(template.suffix.values())) == 5)


def test_plain_is_the_question_alone():
    assert user("plain", "2+2=") == [{"type": "text", "text": "2+2="}]
    assert user("plain", "Which?", problem_type="multiple_choice", options=["A. x", "B. y"])[0]["text"] == "Which?\nA. x B. y"


def test_options():
    template = templates.load("sophia")
    assert template.question("Which?", problem_type="multiple_choice", options=["cat", "dog"]) == "Which?\nA. cat\nB. dog"
    released = templates.load("sophia_released")
    assert released.question("Which?", problem_type="multiple_choice", options=["A. cat", "B. dog"]) == "Which?A. cat; B. dog"


def test_lettered_keeps_letters_that_are_there():
    assert templates.lettered(["cat", "dog"]) == ["A. cat", "B. dog"]
    assert templates.lettered(["(A) cat", "(B) dog"]) == ["(A) cat", "(B) dog"]
    assert templates.lettered(["A. Smith", "dog"]) == ["A. A. Smith", "B. dog"]
    assert templates.lettered(["A.M.", "P.M."]) == ["A. A.M.", "B. P.M."]
    assert templates.lettered([str(i) for i in range(26)])[-1] == "Z. 25"
    with pytest.raises(UserError, match="27 options; letters name at most 26"):
        templates.lettered([str(i) for i in range(27)])


def test_images_come_first_without_marks():
    assert [p["type"] for p in user("plain", "x", images=3)] == ["image"] * 3 + ["text"]


def test_marks_are_honoured():
    parts = user("plain", "<image>left, <image> right", images=2)
    assert parts == [{"type": "image"}, {"type": "text", "text": "left, "}, {"type": "image"}, {"type": "text", "text": " right"}]


@pytest.mark.parametrize("problem,images", [("<image> a", 0), ("<image> a", 2), ("<image><image>", 1)])
def test_marks_must_count_the_images(problem, images):
    with pytest.raises(UserError, match=f"{problem.count('<image>')} <image> placeholders for {images} images"):
        user("plain", problem, images=images)


def test_braces_in_a_question_are_text():
    """A question is a value, never template source."""
    assert user("plain", "{{ 7*7 }} {% if %}")[0]["text"] == "{{ 7*7 }} {% if %}"


@pytest.mark.parametrize("body,message", [
    ("user: '{{ qestion }}'", "'qestion' is undefined"),
    ("user: '{{ problem.__class__.__mro__ }}'", "unsafe|undefined"),
    ("user: '{% if %}'", "template"),
    ("usr: x", "'user' is needed"),
    ("user: x\nsufix: {}", "unknown key 'sufix'; did you mean 'suffix'"),
    ("user: x\nsuffix: {numerica: x}", "did you mean 'numerical'"),
    ("user: [", "cannot be read"),
    ("user: '{{ 1/0 }}'", r"template '.*t.yaml': division by zero"),
    ("user: '{{ options + problem }}'", r"template '.*t.yaml': can only concatenate list"),
    ("user: x\nquestion: '{{ problem / 2 }}'", r"template '.*t.yaml': unsupported operand"),
    ("user: x\nquestion: 5", "'question' must be text, not 5"),
    ("user: x\nsystem: 5", "'system' must be text, not 5"),
    ("user: x\nsystem: [a]", r"'system' must be text, not \['a'\]"),
    ("user: x\nsuffix: 5", "'suffix' must map problem types to texts, not 5"),
    ("user: x\nsuffix: {numerical: 5}", "'suffix.numerical' must be text, not 5"),
    ("user: x\nsuffix: {5: a}", "suffix for unknown problem_type '5'; valid: free_form"),
    ("user: x\n5: a", "unknown key '5'; valid: question"),
    ("user: x\nsystem: 2024-13-45", "cannot be read"),
])
def test_broken_templates(tmp_path, body, message):
    path = tmp_path / "t.yaml"
    path.write_text(body)
    with pytest.raises(UserError, match=message) as error:
        templates.load(str(path)).messages("x", problem_type="text")
    assert "\n" not in str(error.value)


def test_null_is_no_text(tmp_path):
    (tmp_path / "t.yaml").write_text("user: '{{ question }}|{{ suffix }}'\nsystem:\nquestion:\nsuffix: {numerical: , text: ' short '}")
    (tmp_path / "u.yaml").write_text("user: '{{ question }}|{{ suffix }}'\nsuffix:")
    assert user(str(tmp_path / "t.yaml"), "How many?") == user(str(tmp_path / "u.yaml"), "How many?") == [{"type": "text", "text": "How many?|"}]
    assert user(str(tmp_path / "t.yaml"), "x", problem_type="text")[0]["text"] == "x|short"
    assert templates.load(str(tmp_path / "t.yaml")).messages("x", problem_type="text")[0]["role"] == "user"


def test_unknown_template_names_the_nearest():
    with pytest.raises(UserError, match="'sofia' does not exist; did you mean 'sophia'"):
        templates.load("sofia")
