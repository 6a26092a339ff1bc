#!/usr/bin/env bash
# The three ways of choosing a policy, and what a server says of its policies.
#   ./curl.sh [URL] [POLICY]
set -euo pipefail
url=${1:-http://127.0.0.1:30000}
policy=${2:-oea-k3}

post() { curl --silent --show-error -H 'Content-Type: application/json' "$@"; }

echo "# a header; the answer's header says which policy was applied"
post -i -H "X-MoE-Routing-Policy: $policy" "$url/v1/completions" \
  -d '{"model": "demo", "prompt": "It was", "max_tokens": 8}'

echo -e "\n# a field of the body"
post "$url/generate" -d '{"text": "It was", "sampling_params": {"max_new_tokens": 8,
  "custom_params": {"moe_routing_policy": "'"$policy"'"}}}'

echo -e "\n# an alias of the model, where a client can set nothing else"
post "$url/v1/chat/completions" -d '{"model": "demo@'"$policy"'", "max_tokens": 8,
  "messages": [{"role": "user", "content": "Hello"}]}'

echo -e "\n# an unknown name is refused with status 400"
post -w '\n%{http_code}\n' "$url/v1/completions" -d '{"model": "demo@nonesuch", "prompt": "It was"}'

echo -e "\n# which policies there are, and how many experts each layer loaded"
post "$url/v1/moe_routing/policies"
post "$url/v1/moe_routing/statistics"
