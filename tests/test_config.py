"""A configuration is refused at once or can be run; and it survives its manifest."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mismatch_probe.cli.compare import command
from mismatch_probe.config import FORBIDDEN_ENGINE_ARGS, OWNED_ENGINE_ARGS, CompareConfig, Limit
from mismatch_probe.errors import UsageError
from mismatch_probe.results.manifest import Manifest
from tests.factories.manifest import make_manifest

METRICS = ["kl_k3", "ess_seq"]


class TestCompareConfig:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"num_prompts": 0}, "--num-prompts must be above 0, not 0"),
            ({"samples_per_prompt": -1}, "--samples-per-prompt must be above 0"),
            ({"max_tokens": 0}, "--max-tokens must be above 0"),
            ({"rollout_batch": 0}, "--rollout-batch must be above 0"),
            ({"memory_budget_gib": 0.0}, "--memory-budget must be above 0"),
            ({"memory_budget_gib": math.nan}, "--memory-budget must be a finite number, not nan"),
            ({"memory_budget_gib": math.inf}, "--memory-budget must be a finite number, not inf"),
            ({"self_noise_tokens": -1}, "--self-noise-tokens must be 0 or more"),
            ({"temperature": 0.0}, "--temperature must be above 0.*--temperature 1"),
            ({"temperature": math.inf}, "--temperature must be a finite number"),
            ({"temperature": math.nan}, "--temperature must be a finite number"),
            ({"seed": -1}, "--seed must be 0 or more"),
            ({"seed": 1 << 32}, "--seed must be below"),
            ({"rollout_dtypes": ()}, "--rollout-dtypes needs a value"),
            ({"trainer_dtypes": ("float16", "float16")}, "--trainer-dtypes has a value twice"),
            ({"trainer_modes": ()}, "--trainer-mode needs a value"),
            (
                {"rollout_dtypes": ("bfloat16", "int8")},
                "--rollout-dtypes does not accept 'int8'.*bfloat16, float16, float32",
            ),
            ({"rollout_dtypes": ("bfloat16", "bf16")}, "--rollout-dtypes has a value twice"),
            ({"num_prompts": "many"}, "--num-prompts must be a whole number, not 'many'"),
            ({"chat": "perhaps"}, "--chat must be true or false"),
            ({"rollout_dtype": "bf16"}, "no setting 'rollout_dtype'.*'rollout_dtypes'"),
            ({"trainer_modes": ("amp",)}, "--trainer-mode does not accept 'amp'"),
            ({"trainer_layout": "ragged"}, "--trainer-layout does not accept 'ragged'"),
            ({"device": "tpu"}, "--device does not accept 'tpu'"),
            ({"trainer_modes": ("autocast",), "trainer_dtypes": ("float32",)}, "Autocast does not support float32"),
            ({"engine_args": {"x": math.nan}}, "--engine-arg x has a value that JSON cannot represent"),
            ({"engine_args": {"x": [math.inf]}}, "--engine-arg x has a value"),
            ({"engine_args": {"x": object()}}, "--engine-arg x has a value"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UsageError, match=sentence) as caught:
            CompareConfig(**options)
        assert caught.value.exit_code == 2
        assert caught.value.fix

    @pytest.mark.parametrize("name", sorted(FORBIDDEN_ENGINE_ARGS))
    def test_engine_arguments_that_are_refused(self, name: str) -> None:
        argument, _, key = name.partition(".")
        with pytest.raises(UsageError, match=f"--engine-arg {name} is not allowed") as caught:
            CompareConfig(engine_args={argument: {key: "s3cret"} if key else "s3cret"})
        assert "s3cret" not in str(caught.value)
        assert caught.value.fix

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("trust_remote_code", "arbitrary code.*--trust-remote-code"),
            ("worker_cls", "arbitrary code"),
            ("worker_extension_cls", "arbitrary code"),
            ("logits_processors", "arbitrary code"),
            ("kv_transfer_config", "arbitrary code"),
            ("hf_token", "put a secret.*environment"),
            ("hf_overrides", "run different models.*separate checkpoint"),
        ],
    )
    def test_why_they_are_refused(self, name: str, reason: str) -> None:
        with pytest.raises(UsageError, match=reason):
            CompareConfig(engine_args={name: {"a": 1}})

    @pytest.mark.parametrize(
        ("good", "bad"),
        [
            ({"distributed_executor_backend": "ray"}, {"distributed_executor_backend": "pkg.mod.Executor"}),
            ({"load_format": "safetensors"}, {"load_format": "dummy"}),
            ({"compilation_config": {"backend": "inductor"}}, {"compilation_config": {"backend": "pkg.mod.compile"}}),
            ({"compilation_config": 3}, {"compilation_config": {"inductor_passes": {"p": "pkg.mod.f"}}}),
            ({"attention_config": {"backend": "FLASHINFER"}}, {"load_format": ["auto"]}),
        ],
    )
    def test_some_depend_on_their_value(self, good: dict[str, Any], bad: dict[str, Any]) -> None:
        assert CompareConfig(engine_args=good).engine_args == good
        with pytest.raises(UsageError, match="is not allowed"):
            CompareConfig(engine_args=bad)

    def test_arguments_that_measure_something_are_passed_on(self) -> None:
        arguments = {"tensor_parallel_size": 2, "quantization": "fp8", "kv_cache_dtype": "fp8", "enable_lora": True}
        assert CompareConfig(engine_args=arguments).engine_args == arguments

    @pytest.mark.parametrize("name", sorted(OWNED_ENGINE_ARGS))
    def test_engine_arguments_that_would_contradict_an_option(self, name: str) -> None:
        with pytest.raises(UsageError, match=f"Use {OWNED_ENGINE_ARGS[name]}"):
            CompareConfig(engine_args={name: 1})

    def test_no_self_noise_and_fp32_beside_autocast_are_fine(self) -> None:
        CompareConfig(self_noise_tokens=0, trainer_modes=("autocast",), trainer_dtypes=("float16", "float32"))

    def test_names_of_options(self) -> None:
        names = ("num_prompts", "trainer_modes", "memory_budget_gib", "engine_args")
        assert [CompareConfig.called(name) for name in names] == [
            "--num-prompts",
            "--trainer-mode",
            "--memory-budget",
            "--engine-arg",
        ]


CONFIGURATIONS = st.builds(
    CompareConfig,
    model=st.text('ab/é \u2028\x1b"', max_size=6),
    num_prompts=st.none() | st.integers(1, 1000),
    temperature=st.floats(0.01, 10),
    seed=st.integers(0, (1 << 32) - 1),
    rollout_dtypes=st.permutations(("bfloat16", "float16", "float32")).map(tuple),
    trainer_dtypes=st.just(("float16",)),
    trainer_modes=st.sampled_from([("cast",), ("autocast",), ("cast", "autocast")]),
    memory_budget_gib=st.none() | st.floats(0.1, 100),
    engine_args=st.dictionaries(
        st.sampled_from(["block_size", "attention_config", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text("aé\n", max_size=4),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner),
            max_leaves=4,
        ),
    ),
)


class TestManifestRoundTrip:
    @settings(max_examples=40, deadline=None)
    @given(CONFIGURATIONS)
    def test_a_configuration_comes_back_equal(self, config: CompareConfig) -> None:
        assert CompareConfig.model_validate_json(config.model_dump_json()) == config

    @settings(max_examples=40, deadline=None)
    @given(CONFIGURATIONS, st.lists(st.integers(1, 99), max_size=2, unique=True).map(tuple), st.booleans())
    def test_it_comes_back_from_the_command_line(
        self, config: CompareConfig, lengths: tuple[int, ...], eager: bool
    ) -> None:
        config = config.replace(predict_lengths=lengths, eager=eager)
        parsed = command.make_context("compare", config.arguments()).params
        known = CompareConfig.model_fields
        assert CompareConfig(**{k: v for k, v in parsed.items() if k in known and v not in (None, ())}) == config

    @pytest.mark.parametrize("given", [{"speculative": True}, {"temperature": -1}])
    def test_what_a_manifest_cannot_hold_is_not_dropped(self, given: dict[str, Any]) -> None:
        document = make_manifest().content()
        document["config"] |= given
        with pytest.raises(ValidationError, match=rf"config\n?.*{next(iter(given))}"):
            Manifest.model_validate(document)


class TestLimit:
    @pytest.mark.parametrize(
        ("text", "metric", "above", "bound", "rollout", "trainer"),
        [
            ("kl_k3>0.001", "kl_k3", True, 0.001, None, None),
            (" ess_seq < 1e-1 ", "ess_seq", False, 0.1, None, None),
            ("kl_k3>-2", "kl_k3", True, -2.0, None, None),
            ("kl_k3>0.5@bfloat16", "kl_k3", True, 0.5, "bfloat16", "bfloat16"),
            ("kl_k3>0.5@bfloat16/float32", "kl_k3", True, 0.5, "bfloat16", "float32"),
            ("kl_k3>0.5@bf16/fp32", "kl_k3", True, 0.5, "bfloat16", "float32"),
            ("kl_k3 > 0.5 @ bfloat16/float32", "kl_k3", True, 0.5, "bfloat16", "float32"),
        ],
    )
    def test_good_ones(
        self, text: str, metric: str, above: bool, bound: float, rollout: str | None, trainer: str | None
    ) -> None:
        assert Limit.parse(text, METRICS) == Limit(text.strip(), metric, above, bound, rollout, trainer)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("", "not of the form"),
            ("kl_k3", "not of the form"),
            ("kl_k3>=1", "no finite number"),
            ("kl_k3=1", "not of the form"),
            (">1", "not of the form"),
            ("kl_k3>1>2", "no finite number"),
            ("kl_k3>", "not of the form"),
            ("kl_k3>1@", "not of the form"),
            ("kl_k3>1@bfloat16/", "not of the form"),
            ("kl_k3>1@bfloat16/float16/float32", "not of the form"),
            ("kl_k3>much", "no finite number"),
            ("kl_k3>nan", "no finite number"),
            ("kl_k3>inf", "no finite number"),
            ("kl_k9>1", "unknown metric 'kl_k9'.*kl_k3, ess_seq"),
            ("kl_k3>1@int8", "unknown dtype 'int8'"),
            ("kl_k3>1@bfloat16/int8", "unknown dtype 'int8'"),
        ],
    )
    def test_bad_ones(self, text: str, sentence: str) -> None:
        with pytest.raises(UsageError, match=sentence) as caught:
            Limit.parse(text, METRICS)
        assert caught.value.fix

    def test_which_pairs_it_applies_to(self) -> None:
        every, both, one = (Limit.parse(f"kl_k3>1{where}", METRICS) for where in ("", "@bfloat16", "@bfloat16/float32"))
        assert every.applies_to("float16", "float32")
        assert both.applies_to("bfloat16", "bfloat16")
        assert not both.applies_to("bfloat16", "float32")
        assert one.applies_to("bfloat16", "float32")
        assert not one.applies_to("float32", "bfloat16")

    def test_the_bound_itself_is_within(self) -> None:
        above, below = Limit.parse("kl_k3>1", METRICS), Limit.parse("kl_k3<1", METRICS)
        assert [limit.exceeded_by(value) for limit in (above, below) for value in (0.5, 1.0, 1.5)] == [
            False,
            False,
            True,
            True,
            False,
            False,
        ]
