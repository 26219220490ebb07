#!/bin/sh
# Sets up job1 for production: replicated, with a limit of retries, with a queue for tasks that failed for good, and, from RabbitMQ
# 4.3.1 on, with a growing pause before each retry. You can run it again, also to change a queue that is in use: everything except
# the queues' type is a policy, not an argument.
#
# Run it where rabbitmqctl can reach the node:
#
#   kubectl exec -i rabbitmq-0 -- sh -s <examples/rabbitmq/set-up.sh
#   docker compose -f docker/compose.yaml exec -T rabbitmq sh -s <examples/rabbitmq/set-up.sh
#
# For another queue than job1, give its name as the argument: … sh -s job2 <set-up.sh
set -eu
queue=${1:-job1}
pattern="^$(printf %s "$queue" | sed 's/[.+*?^$(){}|[\\]/\\\\&/g')\$"

# Both queues are quorum queues. If there are three nodes, they are replicated to them, and survive the loss of one. Only this type
# counts how often a message was delivered. The type of a queue can't be changed later.
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
# The import doesn't change a queue that exists.
for name in "$queue" "$queue.dead"; do
  type=$(rabbitmqctl -q list_queues name type | awk -v name="$name" '$1 == name { print $2 }')
  [ "$type" = quorum ] || { echo "$name is a $type queue; delete it first, when it is empty" >&2; exit 1; }
done

# delivery-limit: a message that was requeued this often is dead-lettered instead of delivered again. No pod fails then, so a Job
#   could be Complete with a task undone. That is why qconsume has a lower limit (QCONSUME_MAX_ATTEMPTS: 3 in the Jobs). The queue's
#   is for tasks that kill even qconsume. It is more than 3 and a Job's backoffLimit (6) together, so such a task fails its Job
#   first, and it leaves room for evictions of the same task, which count before RabbitMQ 4.3. Without this policy the limit is
#   also 20 from 4.0 on, but the message is dropped; before 4.0 there is no limit.
# dead-letter-exchange "" and dead-letter-routing-key: dead letters go to the queue of that name. The message's header x-death says
#   why it is there: delivery_limit, or rejected (--reject-on, --max-attempts).
# dead-letter-strategy at-least-once: the message leaves the queue only when the other queue has confirmed it. The default strategy
#   may lose it on the way. This one requires
# overflow reject-publish: if the queue has a length limit, publishers get a nack (qpublish reports it), and nothing is dropped.
policy='"delivery-limit": 20,
  "dead-letter-exchange": "", "dead-letter-routing-key": "'$queue'.dead",
  "dead-letter-strategy": "at-least-once", "overflow": "reject-publish"'

# consumer-timeout, from 3.12 on: how long a command may take, in milliseconds (12 hours). The broker's default is half an hour.
#   After that it requeues the message of a task that still runs, and qconsume stops the task and exits 75.
timeout='"consumer-timeout": 43200000'

# delayed-retry, from 4.3.1 on (in 4.3.0 it exists as queue arguments only): a failed message is delivered again after min times its
#   number of failures, but at most max: 10 s, 20 s, 30 s, 30 s … Until then no consumer can get it. So max must be less than the
#   QCONSUME_WAIT of a drainer (1m): otherwise the drainer finds the queue empty and exits 0. With the type "failed", a message
#   that failed (a reject with requeue) waits, and one that was released (a nack) after an eviction is ready at once.
retry='"delayed-retry-type": "failed", "delayed-retry-min": 10000, "delayed-retry-max": 30000'

# Older brokers refuse a policy with keys that they don't know, so try the longest policy first.
set_policy() { rabbitmqctl -q set_policy "$queue" "$pattern" "{$1}" --apply-to queues --priority 1; }
if set_policy "$policy, $timeout, $retry" 2>/dev/null; then
  echo "$queue: delivery limit, dead letters to $queue.dead, 12 h for a task, delayed retry"
elif set_policy "$policy, $timeout" 2>/dev/null; then
  echo "$queue: delivery limit, dead letters to $queue.dead, 12 h for a task (no delayed retry before RabbitMQ 4.3.1)"
else
  set_policy "$policy"
  echo "$queue: delivery limit, dead letters to $queue.dead (consumer_timeout is the node's: rabbitmq.conf)"
fi

# Dead letters stay until you remove them. From 4.0 on a quorum queue has a delivery-limit of 20 by default, so a dead letter that
# was printed and requeued 20 times would be dropped; -1 means no limit. Before 4.0, -1 is refused, and not needed.
rabbitmqctl -q set_policy "$queue.dead" "${pattern%\$}\\\\.dead\$" '{"delivery-limit": -1}' --apply-to queues --priority 1 2>/dev/null || true
