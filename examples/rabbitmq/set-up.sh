#!/bin/sh
# Sets up job1 as production wants it: replicated, with a limit to retries, with a queue for what can't be done, and, from
# RabbitMQ 4.3.1 on, with a growing pause before each retry. May be run again, also to change a running queue: all of it
# but the queues' type is policy, not arguments.
#
# It runs where rabbitmqctl can reach the node:
#
#   kubectl exec -i rabbitmq-0 -- sh -s <examples/rabbitmq/set-up.sh
#   docker compose -f docker/compose.yaml exec -T rabbitmq sh -s <examples/rabbitmq/set-up.sh
#
# and takes another queue than job1 as its argument: … sh -s job2 <set-up.sh
set -eu
queue=${1:-job1}
pattern="^$(printf %s "$queue" | sed 's/[.+*?^$(){}|[\\]/\\\\&/g')\$"

# Both queues are quorum queues: replicated to three nodes where there are as many, safe from the loss of one, and the only
# kind that counts how often a message was delivered. The type of a queue can't be changed later.
definitions=$(mktemp)
trap 'rm -f "$definitions"' EXIT
chmod 644 "$definitions"
cat >"$definitions" <<JSON
{"queues": [
  {"vhost": "/", "name": "$queue",      "durable": true, "auto_delete": false, "arguments": {"x-queue-type": "quorum"}},
  {"vhost": "/", "name": "$queue.dead", "durable": true, "auto_delete": false, "arguments": {"x-queue-type": "quorum"}}
]}
JSON
rabbitmqctl -q import_definitions "$definitions"
# A queue that is there already is left as it is.
for name in "$queue" "$queue.dead"; do
  type=$(rabbitmqctl -q list_queues name type | awk -v name="$name" '$1 == name { print $2 }')
  [ "$type" = quorum ] || { echo "$name is a $type queue; delete it first, when it is empty" >&2; exit 1; }
done

# delivery-limit: a message that was requeued this often is dead-lettered instead of delivered once more, and nobody is told: no
#   pod fails, so that a Job could end Complete with a task undone. Therefore qconsume decides first (QCONSUME_MAX_ATTEMPTS: 3
#   in the Jobs), and this is for what even qconsume doesn't survive. It is more than that and a Job's backoffLimit (6)
#   together: such a task fails its Job first. The rest is for evictions of one and the same task, which count before 4.3.
#   RabbitMQ's own, from 4.0 on, is 20 as well, but drops the message; before, there is none.
# dead-letter-exchange "" and dead-letter-routing-key: to the queue of that name. The message tells in its x-death header
#   why it is there: delivery_limit, or rejected (--reject-on, --max-attempts).
# dead-letter-strategy at-least-once: the message leaves the queue only when the other has confirmed it. The default may
#   lose it on the way. It is only possible together with
# overflow reject-publish: were the queue to have a length limit, publishers would get a nack (qpublish says so) and
#   nothing would be dropped.
policy='"delivery-limit": 20,
  "dead-letter-exchange": "", "dead-letter-routing-key": "'$queue'.dead",
  "dead-letter-strategy": "at-least-once", "overflow": "reject-publish"'

# consumer-timeout, from 3.12 on: how long a command may take, in milliseconds: 12 hours. The broker's own default is half
#   an hour; after that it requeues the message of a task that is still running (qconsume stops it and exits 75).
timeout='"consumer-timeout": 43200000'

# delayed-retry, from 4.3.1 on (4.3.0 knows it as queue arguments only): a failed message is delivered again after min × its
#   number of failures, at most max: 10 s, 20 s, 30 s, 30 s … Until then it is not there for any consumer. So the max must be less than
#   the QCONSUME_WAIT of a drainer (1m), or it would find the queue empty and end well. Type failed: what was rejected waits;
#   what was released (a nack), after an eviction, is ready at once.
retry='"delayed-retry-type": "failed", "delayed-retry-min": 10000, "delayed-retry-max": 30000'

# A broker refuses a policy with a key that it doesn't know.
set_policy() { rabbitmqctl -q set_policy "$queue" "$pattern" "{$1}" --apply-to queues --priority 1; }
if set_policy "$policy, $timeout, $retry" 2>/dev/null; then
  echo "$queue: delivery limit, dead letters to $queue.dead, 12 h for a task, delayed retry"
elif set_policy "$policy, $timeout" 2>/dev/null; then
  echo "$queue: delivery limit, dead letters to $queue.dead, 12 h for a task (no delayed retry before RabbitMQ 4.3.1)"
else
  set_policy "$policy"
  echo "$queue: delivery limit, dead letters to $queue.dead (consumer_timeout is the node's: rabbitmq.conf)"
fi

# The dead letters stay until someone has looked at them. From 4.0 on a quorum queue has a limit of 20 unless told
# otherwise, and a message that was looked at and requeued that often would be dropped; before, -1 is no value, nor needed.
rabbitmqctl -q set_policy "$queue.dead" "${pattern%\$}\\\\.dead\$" '{"delivery-limit": -1}' --apply-to queues --priority 1 2>/dev/null || true
