from __future__ import annotations

import pytest

from qlora_exp.records.redaction import REDACTED, is_secret_key, redact, redact_overrides, redact_text

CANARY = "Canary4711canaryCANARY"


@pytest.mark.parametrize(
    "text",
    [
        f"hf_{CANARY}",
        f"401 for https://me:{CANARY}@host/x",
        f"postgresql+psycopg2://user:p{CANARY}@db:5432/mlflow",
        f"hub_token={CANARY}",
        f"'hub_token': '{CANARY}'",
        f'{{"api_key": "{CANARY}"}}',
        f"password: {CANARY}",
        f"HF_TOKEN={CANARY} python -m x",
        f"Authorization: Bearer {CANARY}",
        f"https://host/x?sig={CANARY}&n=1",
        f"https://host/x?access_token={CANARY}",
        f"sk-{CANARY}",
        f"ghp_{CANARY}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----",
        f'  File "x.py", line 3, in f\n    login(token="{CANARY}")',
    ],
)
def test_no_secret_survives_in_a_text(text: str) -> None:
    assert CANARY not in redact_text(text)
    assert REDACTED in redact_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "training.max_tokens=1000",
        "evaluation.max_new_tokens=16",
        "token_accuracy=0.55, token_f1: 0.4",
        "pad_token=<pad> eos_token='</s>'",
        "unexpected token: 'x' at line 3",
        "self.hf_quantizer.preprocess_model, hf_hub_download",
        "tokenizer=HuggingFaceTokenizer",
        "http://127.0.0.1:5000/#/experiments/1",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "train_tokens_per_second=2400",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact_text(text) == text


def test_settings_are_redacted_by_key_at_any_depth() -> None:
    raw = {
        "hub_token": CANARY,
        "server": {"password": 471147, "headers": [{"Authorization": CANARY}], "url": f"http://a:{CANARY}@h"},
        "secret": {"inner_api_key": CANARY},
        "token": None,
        "use_auth_token": False,
        "max_tokens": 12,
        "token_accuracy": 0.5,
        "template_tokens_trained": {"base": True},
    }
    clean = redact(raw)
    assert CANARY not in str(clean)
    assert "471147" not in str(clean)
    assert clean["token"] is None
    assert clean["use_auth_token"] is False
    assert (clean["max_tokens"], clean["token_accuracy"]) == (12, 0.5)
    assert clean["template_tokens_trained"] == {"base": True}
    assert raw["hub_token"] == CANARY


def test_redacting_twice_changes_nothing() -> None:
    once = redact_text(f"token={CANARY} at https://me:{CANARY}@host")
    assert redact_text(once) == once


def test_overrides_keep_their_form() -> None:
    given = [f"+hub_token={CANARY}", "lora.r=8", f"tracking.uri=http://me:{CANARY}@h:5000", "model.api_key=null", "~x"]
    assert redact_overrides(given) == [
        "+hub_token=***",
        "lora.r=8",
        "tracking.uri=http://me:***@h:5000",
        "model.api_key=null",
        "~x",
    ]


def test_values_of_secret_environment_variables_are_secret_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse battery")
    assert redact_text("login with correct horse battery failed") == "login with *** failed"


@pytest.mark.parametrize(
    "key", ["HF_TOKEN", "hub.token", "apiKey", "AWS_SECRET_ACCESS_KEY", "db_password", "+x.api-key"]
)
def test_secret_keys_are_known(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["tokenizer", "max_tokens", "pad_token", "token_f1", "keys", "monkey", "seed", "author"]
)
def test_other_keys_are_not(key: str) -> None:
    assert not is_secret_key(key)


def test_the_shells_working_folder_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/someone/project")
    monkeypatch.setenv("OLDPWD", "/home/someone/other")
    assert redact_text("sqlite:////home/someone/project/outputs/optuna.db") == (
        "sqlite:////home/someone/project/outputs/optuna.db"
    )
