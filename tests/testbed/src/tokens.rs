//! OAuth 2 tokens, and brokers that accept them, by the plugin that comes with RabbitMQ.

use crate::BrokerOptions;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::hmac;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Signs tokens (JWT, HS256) with a key of its own.
pub struct Issuer {
    key: [u8; 32],
}

impl Issuer {
    /// An issuer with a new key.
    pub fn new() -> Self {
        Self { key: std::array::from_fn(|_| fastrand::u8(..)) }
    }

    /// Makes a broker trust this issuer's tokens, in addition to its own users.
    pub fn trusted_by(&self, options: BrokerOptions) -> BrokerOptions {
        let key = URL_SAFE_NO_PAD.encode(self.key);
        let config = format!(
            "[{{rabbitmq_auth_backend_oauth2, [\
               {{resource_server_id, <<\"rabbitmq\">>}}, \
               {{key_config, [{{default_key, <<\"tests\">>}}, {{signing_keys, #{{<<\"tests\">> => {{map, #{{\
                 <<\"kty\">> => <<\"oct\">>, <<\"alg\">> => <<\"HS256\">>, <<\"kid\">> => <<\"tests\">>, <<\"k\">> => <<\"{key}\">>\
               }}}}}}}}]}}\
             ]}}].\n"
        );
        options
            .plugin("rabbitmq_auth_backend_oauth2")
            .config("auth_backends.1 = rabbit_auth_backend_oauth2\nauth_backends.2 = internal")
            .file("advanced.config", &config)
    }

    /// A token with all permissions that is valid for this long.
    pub fn token(&self, lives: Duration) -> String {
        self.token_until(SystemTime::now() + lives)
    }

    /// A token with all permissions that expires at this time, which may be in the past.
    pub fn token_until(&self, expires: SystemTime) -> String {
        let expires = expires.duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let claims = format!(
            r#"{{"sub":"worker","aud":"rabbitmq","jti":"{:016x}","exp":{expires},"scope":["rabbitmq.configure:*/*","rabbitmq.read:*/*","rabbitmq.write:*/*"]}}"#,
            fastrand::u64(..)
        );
        self.sign(&claims)
    }

    /// A token with these claims, a JSON object.
    pub fn sign(&self, claims: &str) -> String {
        let header = r#"{"alg":"HS256","typ":"JWT","kid":"tests"}"#;
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.key), signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

impl Default for Issuer {
    fn default() -> Self {
        Self::new()
    }
}
