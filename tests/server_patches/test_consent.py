"""What a request's headers say of draft training reaches its sampling parameters, and a no is a no."""

from types import SimpleNamespace

import pytest

from server_patches.common.consent import OPT_KEY, SLICE_KEY, take_headers


def sampling_after(headers, sampling):
    obj = SimpleNamespace(sampling_params=sampling)
    take_headers(None, obj, SimpleNamespace(headers=headers))
    return obj.sampling_params


@pytest.mark.parametrize(
    ("header", "body", "says"),
    [
        ("true", None, True),
        ("False", None, False),
        ("false", True, False),
        ("true", False, False),
        (None, True, True),
    ],
)
def test_a_no_is_a_no_wherever_it_is_said(header, body, says):
    headers = {} if header is None else {"x-draft-training": header}
    sampling = {"temperature": 0, "custom_params": None if body is None else {OPT_KEY: body, "other": 1}}
    found = sampling_after(headers, sampling)
    assert found["custom_params"][OPT_KEY] is says
    assert found["temperature"] == 0
    assert found["custom_params"].get("other") == (None if body is None else 1)


def test_every_request_of_a_batch_gets_what_its_header_says():
    found = sampling_after({"x-draft-slice": "code"}, [{"temperature": 0}, {"temperature": 1}])
    assert [one["custom_params"] for one in found] == [{SLICE_KEY: "code"}] * 2
    assert sampling_after({"x-draft-slice": "code"}, None) == {"custom_params": {SLICE_KEY: "code"}}


@pytest.mark.parametrize("sent", ["santé".encode(), "santé".encode("latin-1")])
def test_a_label_is_the_same_in_a_header_as_in_a_body(sent):
    received = sent.decode("latin-1")  # as Starlette gives it
    assert sampling_after({"x-draft-slice": received}, {})["custom_params"] == {SLICE_KEY: "santé"}


def test_without_a_header_nothing_is_touched():
    given = {"temperature": 0}
    assert sampling_after({}, given) is given
    take_headers(None, SimpleNamespace())  # not by HTTP


@pytest.mark.parametrize(
    ("headers", "own", "label"),
    [({}, {}, "adapter:a"), ({}, {SLICE_KEY: "code"}, "code"), ({"x-draft-slice": "code"}, {}, "code")],
)
def test_an_adapter_is_the_label_of_what_has_no_other(headers, own, label):
    obj = SimpleNamespace(sampling_params={"custom_params": own}, lora_path="a")
    take_headers(None, obj, SimpleNamespace(headers=headers))
    assert obj.sampling_params["custom_params"] == {SLICE_KEY: label}


def test_each_request_of_a_batch_is_labelled_with_its_own_adapter():
    obj = SimpleNamespace(sampling_params={"temperature": 0}, lora_path=["a", None])
    take_headers(None, obj)
    assert [one["custom_params"] for one in obj.sampling_params] == [{SLICE_KEY: "adapter:a"}, {}]


def test_any_other_answer_is_refused_by_name():
    with pytest.raises(ValueError, match="'perhaps' is not accepted; give true or false"):
        sampling_after({"x-draft-training": "perhaps"}, {})


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({OPT_KEY: "false"}, "draft_training: 'false' is not accepted; give true or false"),
        ({OPT_KEY: 0}, "draft_training: 0 is not accepted"),
        ({SLICE_KEY: ["code"]}, "draft_slice: .* is not accepted; give text"),
        ({SLICE_KEY: 5}, "draft_slice: 5 is not accepted"),
    ],
)
def test_a_body_that_says_something_else_is_refused_by_name_in_a_batch_too(own, message):
    for sampling in ({"custom_params": own}, [{}, {"custom_params": own}]):
        with pytest.raises(ValueError, match=message):
            sampling_after({}, sampling)


@pytest.mark.parametrize("own", [[1], "text", 5, {OPT_KEY: None, SLICE_KEY: None}])
def test_a_body_that_says_nothing_is_let_through(own):
    assert sampling_after({}, {"custom_params": own}) == {"custom_params": own}
    assert sampling_after({"x-draft-slice": "code"}, {"custom_params": own})["custom_params"][SLICE_KEY] == "code"
