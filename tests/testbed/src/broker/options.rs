//! The options of a private node, and its start.

use super::settings::{Group, Settings};
use super::{Broker, Source, install};
use crate::ports::reserve_port;
use anyhow::Result;
use std::sync::Arc;

/// The options of a private node.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct BrokerOptions {
    config: String,
    plugins: Vec<String>,
    image: Option<String>,
    files: Vec<(String, String)>,
}

impl BrokerOptions {
    /// Adds lines to the node's rabbitmq.conf.
    pub fn config(mut self, lines: &str) -> Self {
        self.config.push_str(lines);
        self.config.push('\n');
        self
    }

    /// Enables a plugin, such as `rabbitmq_management`. None are enabled by default, because they slow the start down.
    pub fn plugin(mut self, name: &str) -> Self {
        self.plugins.push(name.to_owned());
        self
    }

    /// Adds a file to the node's folder, which is `$folder` in the configuration:
    /// `.config("ssl_options.certfile = $folder/cert.pem").file("cert.pem", &pem)`.
    pub fn file(mut self, name: &str, content: &str) -> Self {
        self.files.push((name.to_owned(), content.to_owned()));
        self
    }

    /// Uses containers of this image, whatever else is available.
    pub fn image(mut self, image: &str) -> Self {
        self.image = Some(image.to_owned());
        self
    }

    /// Starts a private node and waits until it answers.
    pub fn start(&self) -> Result<Broker> {
        Ok(self.cluster(1)?.remove(0))
    }

    /// Starts private nodes that form one cluster, and waits until they do.
    pub fn cluster(&self, size: usize) -> Result<Vec<Broker>> {
        let source = self.source()?;
        let group = Group::start(&source, size > 1)?;
        let settings = (0..size).map(|_| self.settings(&group));
        let mut settings = settings.collect::<Result<Vec<_>>>()?;
        let mut peers = String::from("cluster_formation.peer_discovery_backend = classic_config\n");
        for (index, node) in settings.iter().enumerate() {
            peers += &format!("cluster_formation.classic_config.nodes.{} = {}\n", index + 1, node.name);
        }
        if size > 1 {
            for node in &mut settings {
                node.config.push_str(&peers);
            }
        }
        let brokers = settings.into_iter();
        let brokers = brokers.map(|node| Broker::launch(&source, node));
        let brokers = brokers.collect::<Result<Vec<_>>>()?;
        for broker in &brokers {
            broker.await_start()?;
        }
        if size > 1 {
            // nodes() lists only visible nodes, so not the hidden node of the tool.
            let formed = format!("length(nodes()) == {}", size - 1);
            for broker in &brokers {
                broker.await_cluster(size, &formed)?;
            }
        }
        Ok(brokers)
    }

    fn source(&self) -> Result<Source> {
        match &self.image {
            Some(image) => install::image(image),
            None => install::find(),
        }
    }

    fn settings(&self, group: &Arc<Group>) -> Result<Settings> {
        let port = reserve_port()?;
        let dist_port = reserve_port()?;
        let name = format!("qc{:08x}@localhost", fastrand::u32(..));
        let mut config = format!(
            "listeners.tcp.1 = 127.0.0.1:{}\n\
             # Images may have other defaults.\n\
             loopback_users = none\n\
             log.console = true\n\
             log.console.level = info\n\
             log.file = false\n\
             disk_free_limit.absolute = 50MB\n",
            port.number()
        );
        config.push_str(&self.config);
        Ok(Settings {
            name,
            port,
            dist_port,
            config,
            plugins: format!("[{}].\n", self.plugins.join(",")),
            files: self.files.clone(),
            group: group.clone(),
        })
    }
}
