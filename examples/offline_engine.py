"""SGLang's engine without a server, a policy for each prompt.

    SGLANG_MOE_ROUTING_CONFIG=routing.yaml python offline_engine.py MODEL POLICY

On a machine without a GPU, set SGLANG_PLATFORM=moe_routing_cpu too.
"""

import sys

import sglang


def main(model: str, policy: str) -> None:
    engine = sglang.Engine(model_path=model, random_seed=0)
    plain = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    chosen = {**plain, "custom_params": {"moe_routing_policy": policy}}
    for answer in engine.generate(["The first", "The second"], [chosen, plain]):
        print(f"{answer['meta_info']['moe_routing_policy']}: {answer['text']!r}")
    try:
        engine.generate("The", {"custom_params": {"moe_routing_policy": "nonesuch"}})
    except ValueError as error:
        print("refused:", error)
    (state,) = engine.get_server_info()["internal_states"]
    for layer in state["moe_routing"]["layers"]:
        before, after = (
            layer[name] / layer["calls"] for name in ("active_experts_base", "active_experts")
        )
        print(
            f"layer {layer['layer']}: {layer['calls']} steps, {before:.1f} -> {after:.1f} experts"
        )
    engine.shutdown()


if __name__ == "__main__":  # SGLang starts its processes anew from this file
    main(*sys.argv[1:])
