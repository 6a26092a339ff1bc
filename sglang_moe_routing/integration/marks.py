"""Attributes that this package sets on objects of SGLang's."""

LAYER = "_sglang_moe_routing_layer"
"""Of a `TopKConfig`: opts its layer in; drafts and foreign routers lack it."""

PLAN = "_sglang_moe_routing_plan"
"""Of a `ForwardBatch`: which policies its rows follow; None where no row can be re-routed."""

POLICY_ID = "_sglang_moe_routing_policy_id"
GROUP_ID = "_sglang_moe_routing_group_id"
"""Of a `Req`: its policy and its isolation group."""
